"""The numbers of a training step, under TRL's names where TRL has them."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo.algorithm.advantages import groups_with_spread, overlong_penalty
from softgrpo.algorithm.density import rollout_logq
from softgrpo.algorithm.positions import DensitySettings
from softgrpo.config import Config
from softgrpo.rollout.batch import FINISH_REASONS, RolloutBatch
from softgrpo.rollout.scored import ScoredRollout
from softgrpo_kernels import soft_weights

_STOP, _LENGTH = FINISH_REASONS.index("stop"), FINISH_REASONS.index("length")


def rollout_metrics(
    drawn: ScoredRollout, batch: RolloutBatch, settings: DensitySettings, config: Config
) -> dict[str, float]:
    """Of everything that was drawn for a step: what a refill leaves out counts too.

    batch: what was drawn, packed.
    """
    algorithm, by_function = config.algorithm, drawn.by_function
    if algorithm.overlong_buffer:
        penalty_S = overlong_penalty(
            batch.response_lens, config.rollout.max_new_tokens, algorithm.overlong_buffer
        )
        by_function = {**by_function, "overlong_penalty": penalty_S}
    row = {
        **reward_metrics(drawn.rewards_S, by_function, batch.group),
        **completion_metrics(batch),
        **soft_metrics(batch, settings),
    }
    if settings.soft_enabled:
        # As of this step.
        values = {"tau": settings.tau, "weight_floor": settings.weight_floor}
        values |= {"noise_scale": settings.noise_scale, "temperature": settings.soft_temperature}
        row |= {f"soft/{name}": values[name] for name in config.rollout.schedule.starts}
    if algorithm.dynamic_sampling_rounds:
        row["dynamic_sampling/groups"] = float(len(drawn.outputs))
        row["dynamic_sampling/useful_groups"] = float(len(drawn.useful_groups))
    return row


def reward_metrics(
    rewards_S: Tensor, by_function: dict[str, Tensor], group_S: Tensor
) -> dict[str, float]:
    """Mean and spread of the rewards; NaN (not scored) counts in none of them."""
    scored = rewards_S[~rewards_S.isnan()]
    row = {"reward": _mean(scored), "reward_std": _group_std(rewards_S, group_S)}
    groups = len(group_S.unique())
    row["frac_reward_zero_std"] = 1.0 - len(groups_with_spread(rewards_S, group_S)) / groups
    for name, values in by_function.items():
        values = values[~values.isnan()]
        row[f"rewards/{name}/mean"] = _mean(values)
        row[f"rewards/{name}/std"] = float(values.std()) if len(values) > 1 else 0.0
    return row


def completion_metrics(batch: RolloutBatch) -> dict[str, float]:
    """Response lengths in tokens, and the share cut by the length limit."""
    lens = batch.response_lens.float()
    return {
        "completions/mean_length": float(lens.mean()),
        "completions/min_length": float(lens.min()),
        "completions/max_length": float(lens.max()),
        "completions/clipped_ratio": float((batch.finish == _LENGTH).float().mean()),
        "completions/mean_terminated_length": _mean(lens[batch.finish == _STOP]),
    }


def soft_metrics(batch: RolloutBatch, settings: DensitySettings) -> dict[str, float]:
    """How soft the soft positions are. Nothing for a discrete rollout.

    effective_candidates: mean of 1 / sum w^2. top_weight: mean of the largest weight.
    kept_slots: mean number of candidates that top-k and top-p kept. length: soft positions of a
    sample.
    """
    soft = batch.soft.kind.bool()
    if not settings.soft_enabled:
        return {}
    weights = soft_weights(
        batch.soft.gprime[soft], batch.soft.kind[soft], settings.tau, settings.weight_floor
    )
    kept = rollout_logq(batch.positions(settings), settings)[soft] != -torch.inf
    return {
        "soft/effective_candidates": _mean(1.0 / weights.square().sum(-1)),
        "soft/top_weight": _mean(weights.amax(-1)),
        "soft/kept_slots": _mean(kept.sum(-1).float()),
        "soft/length": float(soft.sum()) / len(batch.group),
    }


def _group_std(rewards_S: Tensor, group_S: Tensor) -> float:
    stds = []
    for g in group_S.unique():
        values = rewards_S[(group_S == g) & ~rewards_S.isnan()]
        if len(values) > 1:
            stds.append(values.std())
    return _mean(torch.stack(stds)) if stds else 0.0


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else float("nan")
