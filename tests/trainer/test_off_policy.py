"""How far ratios of densities spread when the policy has moved, and what a KL makes of it."""

import pytest
import torch

from softgrpo.algorithm.loss import kl_estimator
from softgrpo_kernels import soft_density
from softgrpo_kernels.methods import METHODS

DRAWS = 400_000
Q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.double)


def log_ratio(objective, change, **settings):
    """l_new - l_old [DRAWS] of what was drawn from Q when log q has moved by `change`; the new q
    need not be normalised."""
    torch.manual_seed(0)
    logq = Q[: len(change)].log().expand(DRAWS, -1)
    noise = -torch.empty_like(logq).exponential_().log()
    gprime, order = (logq + noise).sort(-1, descending=True)
    new, old = (
        soft_density(x.gather(-1, order), gprime, objective=objective, **settings)
        for x in (logq + change, logq)
    )
    return new - old


@pytest.mark.parametrize("r", [(0.7, 1.2, 1.1), (1.5, 0.9, 0.8)])
def test_exact_has_the_moments_of_independent_exponentials(r):
    """D = sum (log r - (r - 1) E), E exponential: E exp(2 D) = prod r^2 / (2 r - 1)."""
    r = torch.tensor(r, dtype=torch.double)
    d = log_ratio("exact", r.log())
    assert d.exp().mean().item() == pytest.approx(1.0, abs=0.01)
    second = (r.square() / (2 * r - 1)).prod().item()
    assert (2 * d).exp().mean().item() == pytest.approx(second, rel=0.05)
    assert -d.mean().item() == pytest.approx((r - 1 - r.log()).sum().item(), rel=0.03)
    assert d.var().item() == pytest.approx((r - 1).square().sum().item(), rel=0.02)


@pytest.mark.parametrize("r", [0.1, 0.5, 3.0])
def test_concrete_of_two_candidates_has_a_finite_second_moment(r):
    d = log_ratio("concrete", torch.tensor([r, 1.0], dtype=torch.double).log())
    assert d.exp().mean().item() == pytest.approx(1.0, abs=0.01)
    assert (2 * d).exp().mean().item() == pytest.approx((1 + r + r * r) / (3 * r), rel=0.02)


def test_only_exact_is_without_bound():
    """The others are within max(r)^n / min(r)^n, n the slots that count (3 of them at most), and
    `official` within a factor of 8."""
    change = torch.tensor([1.5, 0.25, 0.8], dtype=torch.double).log()
    spread = (change.max() - change.min()).item()
    floor = {"tau": 0.1, "weight_floor": 0.1}
    for objective, n, settings in (("concrete", 3, {}), ("censored", 3, floor)):
        assert log_ratio(objective, change, **settings).abs().max() < n * spread
    narrow = log_ratio("censored", change, **floor)
    assert narrow.std() < 0.9 * log_ratio("concrete", change).std()
    assert log_ratio("official", change).abs().max() < 2.08
    assert log_ratio("exact", change).max() > 3 * spread


def test_k2_is_the_estimator_where_k3_has_no_variance():
    heavy = {(m.noise, m.objective) for m in METHODS if m.heavy_tailed}
    assert heavy == {(noise, "exact") for noise in ("gumbel", "dirichlet", "gaussian", "embedding")}
    chosen = [kl_estimator(name, tail) for name in ("auto", "k3") for tail in (True, False)]
    assert chosen == ["k2", "k3", "k3", "k3"]
