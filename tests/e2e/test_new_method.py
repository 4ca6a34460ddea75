"""A new soft-thinking method is one class in one file: kernels, engine, configuration and trainer
ask it for the rest."""

import json

import pytest
import torch

from softgrpo import Config, Trainer
from softgrpo.config import ConfigError
from softgrpo_kernels import methods
from softgrpo_kernels.methods.gumbel import Gumbel


class FirstChoice(Gumbel):
    """The token alone: log q of the argmax of g', whatever the weights."""

    objective = "first_choice"
    noise_clip = (-3.0, 5.0)

    def density(self, logq, gprime, rollout):
        return torch.where(gprime[:, 0] > -torch.inf, logq[:, 0], 0.0)

    def rollout_logp(self, gprime, gumbel, scale):
        return gprime - scale * gumbel.clamp(*self.noise_clip)


class EverySlot(Gumbel):
    """log q of every candidate, each with a ratio of its own."""

    objective = "every_slot"
    per_slot = True

    def slot_terms(self, logq, gprime, rollout):
        live = gprime > -torch.inf
        return torch.where(live, logq, 0.0), live.to(logq.dtype)

    def density(self, logq, gprime, rollout):
        terms, counts = self.slot_terms(logq, gprime, rollout)
        return (terms * counts).sum(-1)


def enter(monkeypatch, method):
    """What an entry of METHODS does."""
    monkeypatch.setattr(methods, "METHODS", (*methods.METHODS, method))
    monkeypatch.setattr(methods, "OBJECTIVES", (*methods.OBJECTIVES, method.objective))


@pytest.fixture
def first_choice(monkeypatch):
    enter(monkeypatch, FirstChoice())


def test_it_trains(tiny_config, first_choice, rounding):
    overrides = ["algorithm.objective=first_choice", "run.max_steps=2", "checkpoint.every=0"]
    trainer = Trainer(Config.load(tiny_config, overrides))
    folder = trainer.train()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row["grad_norm"] > 0 for row in rows)
    # The rollout clipped its noise as the method says, and took it off again.
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < rounding
    assert json.loads((folder / "model" / "softgrpo.json").read_text())["soft"]["noise_clip"] == [
        -3.0,
        5.0,
    ]


def test_one_with_a_ratio_of_every_slot_trains(tiny_config, monkeypatch):
    enter(monkeypatch, EverySlot())
    every_slot = ["algorithm.objective=every_slot", "run.max_steps=2", "checkpoint.every=0"]
    folder = Trainer(Config.load(tiny_config, every_slot)).train()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row["grad_norm"] > 0 for row in rows)
    gspo = ["algorithm.ratio_level=sequence", "algorithm.loss_aggregation=sequence"]
    with pytest.raises(ConfigError, match=r"ratio of every drawn slot.*set ratio_level=token"):
        Config.load(tiny_config, [*every_slot, *gspo])


def test_without_an_entry_it_is_unknown(tiny_config):
    with pytest.raises(ConfigError, match=r"'first_choice' is not allowed: must be one of exact"):
        Config.load(tiny_config, ["algorithm.objective=first_choice"])
