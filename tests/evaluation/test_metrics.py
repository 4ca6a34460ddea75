"""pass@k, majority@k and intervals against enumeration and known values."""

import itertools
import math

import numpy as np
import pytest

from softgrpo.evaluation import (
    bootstrap_interval,
    majority_at_k,
    mean_at_n,
    pass_at_k,
    prefix_pass_at_k,
)
from softgrpo.evaluation.metrics import bootstrap_intervals


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


def test_prefix_estimate_depends_on_the_order_and_has_the_same_mean_over_orders():
    correct = [False, False, True, False]
    assert [prefix_pass_at_k(correct, k) for k in (1, 2, 3, 4)] == [0, 0, 1, 1]
    orders = list(itertools.permutations([True, True, False, False, False]))
    for k in range(1, 6):
        mean = sum(prefix_pass_at_k(order, k) for order in orders) / len(orders)
        assert math.isclose(mean, pass_at_k(5, 2, k))
    with pytest.raises(ValueError, match="k = 5 of n = 4"):
        prefix_pass_at_k(correct, 5)


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


def test_intervals_of_several_quantities_are_those_of_each_alone():
    rng = np.random.default_rng(0)
    values = rng.random((30, 4))
    low, high = bootstrap_intervals(values, seed=5)
    for m in range(4):
        assert (low[m], high[m]) == pytest.approx(bootstrap_interval(values[:, m], seed=5))


def test_paired_differences_have_a_narrower_interval_than_their_parts():
    rng = np.random.default_rng(1)
    ours = rng.random(200)
    theirs = ours - 0.1 + 0.01 * rng.standard_normal(200)
    low, high = bootstrap_interval(ours - theirs)
    assert 0.09 < low < 0.1 < high < 0.11
    assert np.diff(bootstrap_interval(ours))[0] > 10 * (high - low)
