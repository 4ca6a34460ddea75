"""Held-out accuracy in the way that a model was trained, and with other thoughts in their place."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from arms import Arm
from graphs import FILL
from toy import HELD_OUT, ID, graphs

from softgrpo import Config
from softgrpo.config.rollout import RolloutConfig
from softgrpo.rollout.sampling import sampling_params, soft_params
from softgrpo_engine import LLM
from softgrpo_kernels.methods import method_of

SAMPLES = 16  # of a question
SEED, STREAM = 1, 1


def variants_of(arm: Arm) -> list[str]:
    """own: as trained. argmax: one node of every mixture. filler: fixed tokens for the thoughts.
    deterministic: the distributions themselves, without noise."""
    if arm.start == "filler":
        return ["own"]
    return (
        ["own", "deterministic", "argmax", "filler"]
        if arm.start == "mixture"
        else ["own", "filler"]
    )


def evaluate(model: Path, config: Config, variants: Sequence[str]) -> dict[str, Any]:
    """Scores of the held-out questions, by variant."""
    questions = graphs("held_out", HELD_OUT)
    answers = np.array([ID[q.answer] for q in questions])
    prompts = [[ID[token] for token in q.prompt.split()] for q in questions]
    engine = LLM(model, dtype="float32", max_model_len=128, max_batch_size=256)
    scores = {}
    for variant in variants:
        rollout, objective, thoughts = _rollout(config, variant)
        outputs = engine.generate_groups(
            [[*prompt, *[ID[FILL]] * thoughts] for prompt in prompts],
            sampling_params(rollout),
            soft_params(rollout, objective) or False,
            seed=SEED,
            uids=[[q * SAMPLES + s for s in range(SAMPLES)] for q in range(len(prompts))],
            stream=STREAM,
        )
        given = np.array([[s.token_ids[-1] for s in output.samples] for output in outputs])
        scores[variant] = _scores(given, answers)
    return scores


def _rollout(config: Config, variant: str) -> tuple[RolloutConfig, str | None, int]:
    """How to sample, the objective that goes with it, and how many filler tokens to append."""
    rollout, objective = config.rollout, config.algorithm.objective
    soft, budget = rollout.soft, rollout.soft.max_soft_tokens or 0
    if not soft.enabled:
        return rollout, objective, rollout.filler_thoughts.count
    if variant == "filler":
        rollout = dataclasses.replace(
            rollout, max_new_tokens=1, soft=dataclasses.replace(soft, enabled=False)
        )
        return rollout, objective, budget
    if variant == "deterministic":
        soft = dataclasses.replace(soft, noise="none", noise_scale=1.0, tau=1.0, weight_floor=0.0)
    if variant == "argmax" and method_of(soft.noise).draws_token:
        soft = dataclasses.replace(soft, noise="multiplex", noise_scale=1.0)  # the drawn token
    elif variant == "argmax":
        soft = dataclasses.replace(soft, weight_floor=1.0)
    rollout = dataclasses.replace(rollout, soft=soft)
    return rollout, method_of(soft.noise).objective, 0


def _scores(given: np.ndarray, answers: np.ndarray) -> dict[str, Any]:
    """mean@n, maj@n and pass@n with 95 % bootstrap intervals over the questions."""
    right = given == answers[:, None]
    votes = np.array([Counter(row).most_common(1)[0][0] for row in given.tolist()]) == answers
    return {
        "mean": _interval(right.mean(1)),
        "maj": _interval(votes.astype(float)),
        "pass": _interval(right.any(1).astype(float)),
        "right": right.sum(1).tolist(),
    }


def _interval(values: np.ndarray) -> dict[str, float]:
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(1000, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"value": float(values.mean()), "low": float(low), "high": float(high)}
