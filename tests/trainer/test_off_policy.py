"""How far ratios of densities spread when the policy has moved, and what a KL makes of it."""

import pytest
import torch

from softgrpo.algorithm.loss import kl_estimator
from softgrpo_kernels import soft_density, soft_token
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


def test_a_clip_range_of_the_objective_clips_few_positions():
    """The ranges that docs/training.md names, at random changes of 0.1 of the logits."""
    torch.manual_seed(0)
    rows = 4000
    logits = 2.5 * torch.randn(rows, 200)
    moved = logits + 0.1 * torch.randn(rows, 200)
    floor = {"weight_floor": 0.1}
    clipped = {}
    for objective, draw, settings, clip in (
        ("exact", {}, {}, 0.5),
        ("concrete", {}, {}, 0.4),
        ("censored", floor, {"tau": 0.1, **floor}, 0.2),
        ("official", {"eps": 1e-6, "noise_clamp": (-1.5, 3.0)}, {}, 0.2),
    ):
        drawn = soft_token(
            logits, top_k=5, top_p=0.95, k_max=5, position=torch.arange(rows), **draw
        )
        ids = drawn.ids.long().clamp(min=0)
        new, old = (
            soft_density(
                x.gather(1, ids).masked_fill(drawn.ids < 0, -torch.inf).log_softmax(-1),
                drawn.gprime, objective=objective, **settings,
            )
            for x in (moved, logits)
        )  # fmt: skip
        away = ((new - old).exp() - 1).abs()
        assert (away > clip).double().mean() < 0.045, objective
        clipped[objective] = (away > 0.2).double().mean().item()
    assert min(clipped["exact"], clipped["concrete"]) > 0.15
