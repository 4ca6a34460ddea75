"""Engines by name: the oracle, one that an installed package brings, and one that is not there."""

import json
from importlib.metadata import EntryPoint

import pytest

from softgrpo import Config, Trainer
from softgrpo.config import engines
from softgrpo.config.schema import ConfigError
from softgrpo.rollout.engines import load_engine


def rewards_of(config, tmp_path, name, engine):
    settings = [f"run.name={name}", f"rollout.engine={engine}", "checkpoint.export_hf=false"]
    settings += ["run.max_steps=3", "optim.minibatch_prompts=null"]
    Trainer(Config.load(config, settings)).train()
    rows = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["reward"] for row in rows]


def test_training_is_the_same_with_any_engine(tiny_config, tmp_path, monkeypatch, rounding):
    """The oracle, and an engine that an installed package brings."""
    monkeypatch.setattr(engines, "entry_points", lambda group: [_installed(group)])
    native = rewards_of(tiny_config, tmp_path, "a", "native")
    assert rewards_of(tiny_config, tmp_path, "b", "hf") == pytest.approx(
        native, abs=min(0.1, rounding)
    )
    assert rewards_of(tiny_config, tmp_path, "c", "mine") == native


def _installed(group):
    return EntryPoint("mine", "softgrpo_engine:LLM", group)


def test_an_unknown_engine_lists_what_there_is(monkeypatch):
    monkeypatch.setattr(engines, "entry_points", lambda group: [_installed(group)])
    with pytest.raises(ConfigError, match="no engine 'vllm'; there are: hf, mine, native"):
        Config.load("demo", ["rollout.engine=vllm"])
    broken = EntryPoint("broken", "nowhere.at.all:Engine", engines.GROUP)
    monkeypatch.setattr(engines, "entry_points", lambda group: [broken])
    with pytest.raises(ConfigError, match=r"'broken' cannot be imported: No module named 'nowh"):
        load_engine("broken")


def test_an_engine_without_a_method_is_refused(monkeypatch):
    """One that was written before engines slept."""
    point = EntryPoint("old", f"{OldEngine.__module__}:OldEngine", engines.GROUP)
    monkeypatch.setattr(engines, "entry_points", lambda group: [point])
    monkeypatch.setattr(EntryPoint, "load", lambda self: OldEngine)
    with pytest.raises(ConfigError, match=r"'old' has no sleep\(\): .*RolloutEngine"):
        load_engine("old")


class OldEngine:
    check_fits = iter_groups = update_weights = None
