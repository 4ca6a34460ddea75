"""Scores as pure functions: mean@n, pass@k, majority@k, bootstrap intervals."""

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


def prefix_pass_at_k(correct: Sequence[bool], k: int) -> float:
    """1.0 if one of the first k samples is right: the estimate in the paper's own evaluation code.

    Its expectation is that of `pass_at_k`, its variance is larger, and it hangs on the order of
    the samples. Raises ValueError unless 1 <= k <= n.
    """
    pass_at_k(len(correct), 0, k)  # checks k
    return float(any(correct[:k]))


def mean_at_n(correct: Sequence[bool | float]) -> float:
    """Mean score of the n samples of a question. Raises ValueError when there is none."""
    if not correct:
        raise ValueError("mean@n needs at least one sample")
    return sum(map(float, correct)) / len(correct)


def majority(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer; None does not vote, a tie goes to the answer that came first."""
    votes = Counter(answer for answer in answers if answer is not None)
    # Counter keeps the order of first appearance and most_common is stable in it.
    return votes.most_common(1)[0][0] if votes else None


def majority_at_k(answers: Sequence[str | None], gold: str, k: int) -> bool:
    """Whether the most frequent of the first k answers is the gold one.

    answers: normalised as `softgrpo.rewards.extract_answer` does, None where there is none. None
    does not vote; a tie goes to the answer that came first; without a vote the result is False.
    Raises ValueError unless 1 <= k <= len(answers).
    """
    if not 1 <= k <= len(answers):
        raise ValueError(f"maj@k needs 1 <= k <= n, got k = {k} of n = {len(answers)} samples")
    return majority(answers[:k]) == gold


def bootstrap_interval(
    values: Sequence[float], seed: int = 0, *, level: float = 0.95, draws: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` (one a question).

    The questions are resampled, so that the interval covers the choice of questions and the
    samples of each. Of paired differences it is the paired bootstrap. Deterministic in the seed.
    Raises ValueError when there are no values.
    """
    low, high = bootstrap_intervals(np.asarray(values)[:, None], seed, level=level, draws=draws)
    return float(low[0]), float(high[0])


def bootstrap_intervals(
    values_QM: np.ndarray, seed: int = 0, *, level: float = 0.95, draws: int = 2000
) -> tuple[np.ndarray, np.ndarray]:
    """`bootstrap_interval` of M quantities over the same draws of questions: low [M], high [M]."""
    questions = len(values_QM)
    if not questions:
        raise ValueError("a bootstrap interval needs at least one value")
    picks_DQ = np.random.default_rng(seed).integers(0, questions, size=(draws, questions))
    # How often each draw takes each question: D x Q numbers instead of D x Q x M.
    cells = picks_DQ + questions * np.arange(draws)[:, None]
    counts_DQ = np.bincount(cells.ravel(), minlength=draws * questions).reshape(draws, questions)
    means_DM = counts_DQ @ values_QM.astype(np.float64) / questions
    low, high = np.quantile(means_DM, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high
