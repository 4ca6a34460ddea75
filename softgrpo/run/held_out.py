"""Held-out evaluation during training: mean@n and pass@k, on a noise stream of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softgrpo.config import Config
from softgrpo.config.rollout import RolloutConfig
from softgrpo.data.training import TrainingData
from softgrpo.distributed import World
from softgrpo.evaluation import pass_at_k
from softgrpo.rewards import RewardRunner
from softgrpo.rollout.engines import RolloutEngine
from softgrpo.rollout.sampling import Sampling, rollout_uids
from softgrpo.rollout.scored import ScoredRollout
from softgrpo.run.round import Round
from softgrpo_engine import Output


def evaluation_rollout(config: Config) -> RolloutConfig:
    """The rollout's settings with those that `eval` has of its own in their place."""
    own = config.eval
    sampling = {"temperature": own.temperature, "top_p": own.top_p, "top_k": own.top_k}
    soft = dataclasses.replace(config.rollout.soft, **_given(sampling), **_given({"tau": own.tau}))
    limit = _given({"max_new_tokens": own.max_new_tokens})
    return dataclasses.replace(config.rollout, soft=soft, **_given(sampling), **limit)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def evaluate(
    llm: RolloutEngine, data: TrainingData, rewards: RewardRunner, config: Config, world: World
) -> ScoredRollout:
    """Samples the held-out prompts ``eval.samples`` times each, shared among the processes."""
    prompts = data.eval_prompts()
    drawn = Round(
        llm,
        rewards,
        world,
        prompts,
        rollout_uids(0, len(prompts), config.eval.samples),
        Sampling.of_evaluation(config, evaluation_rollout(config)),
    )
    drawn.sample()
    drawn.wait()
    drawn.gather()
    return drawn.scored()


def evaluation_row(
    step: int, outputs: Sequence[Output], rewards_S: Tensor, ks: Sequence[int]
) -> dict[str, Any]:
    """The metrics row of an evaluation.

    rewards_S: float [S] in output order; NaN (not scored) counts as 0. mean@n is the mean reward;
    a sample is correct for pass@k when its reward is at least 1.
    """
    rewards = torch.nan_to_num(rewards_S, nan=0.0)
    n = len(outputs[0].samples)
    correct = (rewards.view(-1, n) >= 1.0).sum(-1).tolist()
    samples = [sample for output in outputs for sample in output.samples]
    row: dict[str, Any] = {"step": step, f"eval/mean@{n}": float(rewards.mean())}
    for k in ks:
        row[f"eval/pass@{k}"] = sum(pass_at_k(n, c, k) for c in correct) / len(correct)
    lengths = [len(sample.token_ids) for sample in samples]
    row["eval/mean_length"] = sum(lengths) / len(lengths)
    row["eval/clipped_ratio"] = sum(s.finish_reason == "length" for s in samples) / len(samples)
    return row
