"""Rewards: the mathematical one, and the runner that keeps any of them from hanging a run."""

from softgrpo.rewards.math import extract_answer, math_reward, normalise_answer
from softgrpo.rewards.runner import RewardRunner, apply_require_eos
from softgrpo.rewards.worker import RewardError, RewardFunc

__all__ = [
    "RewardError",
    "RewardFunc",
    "RewardRunner",
    "apply_require_eos",
    "extract_answer",
    "math_reward",
    "normalise_answer",
]
