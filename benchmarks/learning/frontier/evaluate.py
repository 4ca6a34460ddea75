"""Held-out accuracy in the way that a model was trained, and with other thoughts in their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from arms import Arm

from softgrpo import Config
from softgrpo.config.rollout import RolloutConfig
from softgrpo.evaluation.metrics import bootstrap_interval, majority, pass_at_k
from softgrpo.rollout.sampling import sampling_params, soft_params
from softgrpo_engine import LLM, SamplingParams, SoftParams
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


class Evaluation:
    """Of one model. Variants that come to the same sampling are sampled once, whatever the arm.

    questions: (prompt, id of the answer), the answer being the token after the thoughts. filler:
    the token that is fed for a thought in the variant of that name.
    """

    def __init__(
        self,
        model: Path,
        questions: Sequence[tuple[list[int], int]],
        filler: int,
        dtype: str = "float32",
    ) -> None:
        self._prompts, self._answers = zip(*questions, strict=True)
        self._filler = filler
        longest = max(map(len, self._prompts)) + 16
        self._engine = LLM(model, dtype=dtype, max_model_len=longest, max_batch_size=256)
        self._done: dict[Any, dict[str, Any]] = {}

    def scores(self, config: Config, variants: Sequence[str]) -> dict[str, Any]:
        """Of the held-out questions, by variant."""
        return {variant: self._sampled(*_sampling(config, variant)) for variant in variants}

    def _sampled(
        self, params: SamplingParams, soft: SoftParams | Literal[False], thoughts: int
    ) -> dict[str, Any]:
        key = (params, soft, thoughts)
        if key not in self._done:
            outputs = self._engine.generate_groups(
                [[*prompt, *[self._filler] * thoughts] for prompt in self._prompts],
                params,
                soft,
                seed=SEED,
                uids=[[q * SAMPLES + s for s in range(SAMPLES)] for q in range(len(self._prompts))],
                stream=STREAM,
            )
            given = [[sample.token_ids[-1] for sample in output.samples] for output in outputs]
            self._done[key] = _scores(given, self._answers)
        return self._done[key]


def _sampling(
    config: Config, variant: str
) -> tuple[SamplingParams, SoftParams | Literal[False], int]:
    """With how many filler tokens at the end of the prompt."""
    rollout, objective, thoughts = _rollout(config, variant)
    return sampling_params(rollout), soft_params(rollout, objective) or False, thoughts


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


def _scores(given: list[list[int]], answers: Sequence[int]) -> dict[str, Any]:
    """mean@n, maj@n and pass@n with 95 % bootstrap intervals over the questions."""
    right = [sum(a == answer for a in row) for row, answer in zip(given, answers, strict=True)]
    votes = [
        majority([*map(str, row)]) == str(answer)
        for row, answer in zip(given, answers, strict=True)
    ]
    return {
        "mean": _interval([count / SAMPLES for count in right]),
        "maj": _interval([float(vote) for vote in votes]),
        "pass": _interval([pass_at_k(SAMPLES, count, SAMPLES) for count in right]),
        "right": right,
    }


def _interval(values: list[float]) -> dict[str, float]:
    low, high = bootstrap_interval(values, draws=1000)
    return {"value": mean(values), "low": low, "high": high}
