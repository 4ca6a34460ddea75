"""A run whose reward falls while the policy drifts: it says so, and can end with its best model."""

import json

import pytest
import torch
from checkpoints import weights_of
from safetensors.torch import load_file
from simulated_gpu.plugin import ON_THE_CPU

from softgrpo import Config, Trainer

WINDOW = 10


@pytest.fixture
def falling_reward():
    """Different within every group; from the 21st step on half of what it was."""
    steps = []

    def reward(prompts, completions, **columns):
        steps.append(len(completions))
        level = 1.0 if len(steps) <= 2 * WINDOW else 0.5
        return [level * (1 + 0.01 * (i % 4)) for i in range(len(completions))]

    return reward


@ON_THE_CPU
def test_a_collapsed_run_ends_with_its_best_checkpoint(
    tiny_config, tmp_path, falling_reward, capsys
):
    overrides = [
        f"health.window={WINDOW}",
        "health.stop=true",
        "algorithm.kl_coef=1e-4",
        "run.max_steps=60",
        "checkpoint.every=5",
        "checkpoint.keep=1",
        "log.samples_every=0",
    ]
    trainer = Trainer(Config.load(tiny_config, overrides), reward_funcs=[falling_reward])
    trainer.train()
    shown = capsys.readouterr().out
    assert "warning: the reward fell from 1.0" in shown
    assert "(health.stop); the model is that of step 20" in shown
    run = tmp_path / "runs" / "tiny"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "reward" in row]
    assert 3 * WINDOW <= steps[-1] < 60
    assert rows[-1] == {"step": 20, "summary/model_of_step": 20}
    # Beside the newest checkpoint the best one is still there, and it is the model.
    kept = [f"step_{step:06d}" for step in (20, steps[-1])]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == kept
    best = weights_of(run / "checkpoints" / kept[0])
    model = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(model[n], best[n].to(model[n].dtype)) for n in best if n in model)
    assert len(set(model) & set(best)) > 5
    assert "Warning at step" in (run / "report.html").read_text()
    # The run remembers, also after a restart, and goes on when it is told to.
    again = [*overrides, "run.resume=auto", f"run.max_steps={steps[-1] + 2}"]
    Trainer(Config.load(tiny_config, again), reward_funcs=[falling_reward]).train()
    again.append("health.stop=false")
    Trainer(Config.load(tiny_config, again), reward_funcs=[falling_reward]).train()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "reward" in row] == [
        *steps,
        steps[-1] + 1,
        steps[-1] + 2,
    ]
