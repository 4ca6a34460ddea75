"""pass@k, majority@k and intervals against enumeration and known values."""

import itertools
import math

import numpy as np
import pytest

from softgrpo.evaluation import bootstrap_interval, majority_at_k, mean_at_n, pass_at_k


def test_pass_at_k_equals_the_enumeration_of_all_subsets():
    for n, c in [(1, 0), (1, 1), (4, 1), (5, 2), (6, 6), (7, 0), (8, 3)]:
        right = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(right, k))
            expected = sum(any(subset) for subset in subsets) / len(subsets)
            assert math.isclose(pass_at_k(n, c, k), expected, abs_tol=1e-12)


def test_pass_at_k_is_stable_for_large_n():
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match=r"pass@k needs"):
        pass_at_k(n, c, k)


def test_mean_at_n():
    assert mean_at_n([True, False, False, 1.0]) == 0.5
    with pytest.raises(ValueError, match="at least one"):
        mean_at_n([])


@pytest.mark.parametrize(
    ("answers", "k", "right"),
    [
        (["3", "7", "7"], 3, True),
        (["3", "7", "7"], 2, False),  # a tie: the earliest wins
        (["7", "3", "3", "7"], 4, True),  # the same the other way round
        ([None, None, "7"], 3, True),  # None does not vote
        ([None, None, "3"], 2, False),  # no vote at all
    ],
)
def test_majority_at_k(answers, k, right):
    assert majority_at_k(answers, "7", k) is right


def test_majority_at_k_refuses_k_above_n():
    with pytest.raises(ValueError, match=r"k = 3 of n = 2"):
        majority_at_k(["1", "2"], "1", 3)


def test_bootstrap_interval_is_the_normal_interval_for_many_values():
    values = (np.arange(400) % 4 == 0).astype(float)  # mean 1/4
    low, high = bootstrap_interval(values, seed=3)
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert low == pytest.approx(0.25 - half, abs=0.006)
    assert high == pytest.approx(0.25 + half, abs=0.006)
    assert (low, high) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval([1.0]) == (1.0, 1.0)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([])
