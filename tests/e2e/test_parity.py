"""softgrpo-parity: agreement of engine, trainer and transformers, and that it can fail."""

import pytest
import torch

from softgrpo.cli.parity import main
from softgrpo.learner.policy import Policy
from softgrpo.tools import parity

# Soft alone; a budget with discrete positions after it; candidates; the whole vocabulary; a
# density with a known difference between engine and trainer; noise that does not come off again.
CASES = {
    "exact": [],
    "both": ["rollout.soft.max_soft_tokens=4", "rollout.temperature=0.8"],
    "candidates": ["rollout.soft.enabled=false"],
    "vocabulary": ["rollout.soft.enabled=false", "rollout.top_k=-1", "rollout.top_p=1.0"],
    "nucleus": ["rollout.soft.enabled=false", "rollout.top_k=-1", "rollout.top_p=0.9"],
    "official": ["algorithm.objective=official", "rollout.soft.max_soft_tokens=4"],
    "dirichlet": ["rollout.soft.noise=dirichlet", "rollout.soft.tau=1"],
    "embedding": ["rollout.soft.noise=embedding", "rollout.soft.tau=1"],
}


def table(shown):
    return [line.split() for line in shown.splitlines() if line.strip()]


@pytest.mark.parametrize("case", CASES)
def test_the_three_agree_in_float32(case, tiny_config, capsys):
    assert main([str(tiny_config), "--max-tokens", "8", *CASES[case]]) == 0
    shown = capsys.readouterr().out
    assert "within bounds" in shown
    discrete = [row for row in table(shown) if row[0] == "discrete" and len(row) > 1]
    assert all(row[-1] == "ok" for row in discrete)
    phases = {row[0] for row in table(shown)} & {"soft", "discrete"}
    soft = set() if case in ("candidates", "vocabulary", "nucleus") else {"soft"}
    assert phases == soft | (set() if case in ("exact", "dirichlet", "embedding") else {"discrete"})


def test_a_model_by_its_path_has_both_phases(tiny_model, capsys):
    assert main([str(tiny_model), "--max-tokens", "8", "model.dtype=float32"]) == 0
    shown = capsys.readouterr().out
    assert {"soft", "discrete"} <= {row[0] for row in table(shown)}


def test_a_trainer_that_computes_something_else_is_out_of_bounds(
    tiny_config, capsys, monkeypatch, rounding
):
    forward, factor = Policy.forward, 1.001 if rounding < 1 else 1.5  # bfloat16's bounds are wide

    def skewed(self, batch):
        with torch.no_grad():
            self.decoder.model.norm.weight.mul_(factor)
        return forward(self, batch)

    monkeypatch.setattr(Policy, "forward", skewed)
    assert main([str(tiny_config), "--max-tokens", "8"]) == 1
    shown = capsys.readouterr().out
    assert "out of bounds: engine/trainer, log p of soft positions" in shown
    rows = [row for row in table(shown) if row[:3] == ["soft", "log", "p"]]
    verdicts = {row[3]: " ".join(row[8:]) for row in rows}
    assert verdicts == {
        "engine/trainer": "TOO FAR",
        "engine/HF": "ok",
        "trainer/HF": "TOO FAR",
    }


def test_nan_is_out_of_bounds():
    nan = parity.Difference("soft", "log p", "engine/trainer", 1, float("nan"), 1.0, 1e-4)
    assert not nan.holds


def test_errors_are_one_line(capsys):
    assert main(["./nowhere"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
