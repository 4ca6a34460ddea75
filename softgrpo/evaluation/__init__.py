"""Evaluation: scores as plain functions, and what the command `softgrpo-eval` is made of."""

from softgrpo.evaluation.metrics import (
    bootstrap_interval,
    majority_at_k,
    mean_at_n,
    pass_at_k,
    prefix_pass_at_k,
)
from softgrpo.evaluation.score_file import score_file

__all__ = [
    "bootstrap_interval",
    "majority_at_k",
    "mean_at_n",
    "pass_at_k",
    "prefix_pass_at_k",
    "score_file",
]
