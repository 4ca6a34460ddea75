"""Rewards: the mathematical one, and the runner that keeps any of them from hanging a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from softgrpo.rewards.runner import RewardRunner, apply_require_eos
from softgrpo.rewards.worker import RewardError, RewardFunc

if TYPE_CHECKING:
    from softgrpo.rewards.math import extract_answer, math_reward, normalise_answer

__all__ = [
    "RewardError",
    "RewardFunc",
    "RewardRunner",
    "apply_require_eos",
    "extract_answer",
    "math_reward",
    "normalise_answer",
]


def __getattr__(name: str) -> Any:
    # math-verify imports sympy, a second or two in every process that computes rewards.
    if name in __all__:
        from softgrpo.rewards import math

        return getattr(math, name)
    raise AttributeError(f"module 'softgrpo.rewards' has no attribute {name!r}")
