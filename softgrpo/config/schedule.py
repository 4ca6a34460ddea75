"""Soft settings that change over the first steps of a run."""

from __future__ import annotations

from dataclasses import replace

from softgrpo.config.rollout import RolloutConfig, SoftConfig


def soft_at(rollout: RolloutConfig, step: int) -> SoftConfig:
    """The soft settings of a training step (1-based), of its rollouts and its densities.

    Each setting with a start value goes linearly from it, at step 1, to that of `rollout.soft`, at
    step `schedule.steps` and after. A function of the step: a resumed run needs no more.
    """
    steps = rollout.schedule.steps
    if step >= steps:
        return rollout.soft
    left = (steps - step) / (steps - 1)
    values = {}
    for name, start in rollout.schedule.starts.items():
        final = getattr(rollout.soft, name)
        values[name] = final + left * (start - final)
    return replace(rollout.soft, **values)
