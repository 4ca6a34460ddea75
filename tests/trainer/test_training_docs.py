"""docs/training.md: the table of keys is current, and its examples load and run."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from softgrpo.config import Config, SupervisedConfig, recipe_names
from softgrpo.config.supervised import SupervisedDataConfig
from softgrpo.config.table import with_config_table

DOCUMENT = Path(__file__).parents[2] / "docs" / "training.md"


@pytest.fixture(scope="module")
def text():
    return DOCUMENT.read_text()


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_table_of_keys_is_current(text):
    assert with_config_table(text) == text, "run: python -m softgrpo.config.table docs/training.md"


def test_a_document_without_marks_is_refused():
    with pytest.raises(ValueError, match="has no <!-- keys"):
        with_config_table("# Training\n")


def test_the_yaml_examples_load(text, tmp_path):
    for number, block in enumerate(blocks(text, "yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block)
        if "batch_size" in block:
            SupervisedConfig.load(path)
            continue
        Config.load(path, [] if {"base", "data"} & set(yaml.safe_load(block)) else ["data.train=a"])


def test_the_reward_examples_do_what_they_say(text, monkeypatch):
    own, verl = blocks(text, "python")
    names = {}
    exec(own, names)
    rewards = names["larger"](["898.", "898 is larger than 857", "It is 898", "857"], ["898"] * 4)
    assert rewards == [1.0, 0.0, 0.5, 0.0]
    theirs = SimpleNamespace(
        compute_score=lambda data_source, solution_str, ground_truth, extra_info: float(
            (data_source, solution_str, extra_info) == ("gsm8k", ground_truth, {"index": 0})
        )
    )
    monkeypatch.setitem(sys.modules, "my_project", theirs)
    exec(verl, names)
    columns = {"data_source": ["gsm8k"] * 2, "answer": ["1", "2"], "ability": ["math"] * 2}
    completions = [[{"role": "assistant", "content": text}] for text in ("1", "1")]
    scores = names["verl_score"](completions, extra_info=[{"index": 0}] * 2, **columns)
    assert scores == [1.0, 0.0]


def test_the_recipes_that_it_names_exist(text):
    named = set(re.findall(r"`((?:demo|paper|figure)[\w.-]*)`", text)) - {"paper-1.5b.yaml"}
    assert named <= set(recipe_names())
    assert len(named) > 5


def test_the_metrics_and_settings_that_it_names_exist(text):
    """Every `section.key` in backticks is a key of reinforcement learning or of softgrpo-sft."""
    configs = Config.load("demo"), SupervisedConfig(data=SupervisedDataConfig("a.jsonl"))
    for key in re.findall(r"`([a-z]+\.[a-z_.]+)(?:=[^`]*)?`", text):
        section, *rest = key.split(".")
        if section not in Config.__dataclass_fields__ or rest[-1] in ("html", "yaml", "jsonl"):
            continue
        assert any(has(config, key) for config in configs), key


def has(value, key):
    """Whether there is a value under a dotted key."""
    for name in key.split("."):
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
    return True
