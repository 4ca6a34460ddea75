"""Training, parity and evaluation with --engine vllm."""

import json
from importlib import import_module

import pytest

CONFIG = """
run: {{name: {name}, output_dir: {folder}/runs, max_steps: 2, seed: 3}}
model: {{path: {model}, dtype: float32}}
data: {{train: {folder}/train.jsonl, eval: null, max_prompt_tokens: 64}}
rollout: {{prompts_per_step: 2, group_size: 3, max_new_tokens: 8, max_batch_size: 4}}
reward: {{functions: [{{path: "{folder}/reward.py:early"}}], require_eos: false}}
optim: {{lr: 3e-3}}
"""
REWARD = """
def early(prompts, completions, **columns):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum("a" <= x <= "m" for x in t) / max(1, len(t)) for t in texts]
"""


def run(command, *arguments):
    """A command in this process, and vLLM with it."""
    assert import_module(f"softgrpo.cli.{command}").main([*map(str, arguments)]) in (0, None)


@pytest.fixture
def config(tmp_path, model, tokenizer):
    """config(name): a file with a run of that name."""
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(model)
    prompts = ["abac", "bcbdbe", "cacbccda", "aaabbb"]
    rows = [json.dumps({"prompt": prompt, "answer": "aa"}) for prompt in prompts]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    (tmp_path / "reward.py").write_text(REWARD)

    def write(name):
        path = tmp_path / f"{name}.yaml"
        path.write_text(CONFIG.format(name=name, folder=tmp_path, model=model))
        return path

    return write


def rows_of(tmp_path, name):
    lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_training_is_that_with_our_engine(config, tmp_path):
    """Two steps, and with them an update of the weights."""
    run("train", "--config", config("vllm"), "rollout.engine=vllm")
    run("train", "--config", config("native"))
    for found, expected in zip(rows_of(tmp_path, "vllm"), rows_of(tmp_path, "native"), strict=True):
        assert found["reward"] == pytest.approx(expected["reward"], abs=1e-6)
        drift = {k: v for k, v in found.items() if "logp_diff" in k and "mean" in k}
        assert drift
        assert all(value < 1e-4 for value in drift.values()), drift


def test_parity_is_within_its_bounds(config, capsys):
    run("parity", config("parity"), "rollout.engine=vllm")
    assert "within bounds" in capsys.readouterr().out


def test_an_evaluation_is_that_with_our_engine(config, model, tmp_path):
    config("any")
    questions = tmp_path / "train.jsonl"
    texts = []
    for engine in ("vllm", "native"):
        folder = tmp_path / engine
        run(
            "eval", "--model", model, "--task", questions, "--samples", 2, "--max-tokens", 8,
            "--dtype", "float32", "--batch-size", 4, "--engine", engine, "--output", folder,
        )  # fmt: skip
        lines = (folder / "samples.jsonl").read_text().splitlines()
        rows = sorted(map(json.loads, lines), key=lambda row: (row["mode"], row["question"]))
        texts.append([[sample["text"] for sample in row["samples"]] for row in rows])
    assert texts[0] == texts[1]
    assert len(texts[0]) == 8  # soft and discrete
