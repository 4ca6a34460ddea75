"""Evaluation as pure functions: mean@n, unbiased pass@k, majority@k, bootstrap intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k samples, drawn without replacement from n of which c are right, hold one.

    Unbiased for the pass@k of the model: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, arXiv
    2107.03374), as a product. Raises ValueError unless 1 <= k <= n and 0 <= c <= n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@k needs 1 <= k <= n, got k = {k} of n = {n} samples")
    if not 0 <= c <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n, got c = {c} right of n = {n} samples")
    return 1.0 - math.prod((n - c - i) / (n - i) for i in range(k))


def mean_at_n(correct: Sequence[bool | float]) -> float:
    """Mean score of the n samples of a question. Raises ValueError when there is none."""
    if not correct:
        raise ValueError("mean@n needs at least one sample")
    return sum(map(float, correct)) / len(correct)


def majority_at_k(answers: Sequence[str | None], gold: str, k: int) -> bool:
    """Whether the most frequent of the first k answers is the gold one.

    answers: normalised as `softgrpo.rewards.extract_answer` does, None where there is none. None
    does not vote; a tie goes to the answer that came first; without a vote the result is False.
    Raises ValueError unless 1 <= k <= len(answers).
    """
    if not 1 <= k <= len(answers):
        raise ValueError(f"maj@k needs 1 <= k <= n, got k = {k} of n = {len(answers)} samples")
    votes = Counter(answer for answer in answers[:k] if answer is not None)
    # Counter keeps the order of first appearance and most_common is stable in it.
    return bool(votes) and votes.most_common(1)[0][0] == gold


def bootstrap_interval(
    values: Sequence[float], seed: int = 0, *, level: float = 0.95, draws: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` (one a question).

    The questions are resampled, so that the interval covers the choice of questions and the
    samples of each. Deterministic in the seed. Raises ValueError when there are no values.
    """
    if not len(values):
        raise ValueError("a bootstrap interval needs at least one value")
    array = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(array), size=(draws, len(array)))
    low, high = np.quantile(array[picks].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
