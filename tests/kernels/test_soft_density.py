"""Densities of soft tokens against independently written closed forms, in fp64."""

import math

import pytest
import torch

from softgrpo_kernels import gumbel_noise, soft_density

N, K = 7, 5
OBJECTIVES = ["exact", "official", "concrete"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def record():
    """log q of ids that differ in a row, 1 to K of them in use, and g' sampled from it."""
    ids = torch.stack([torch.randperm(40)[:K] for _ in range(N)]).int()
    n = 1 + torch.arange(N) % K
    ids = torch.where(torch.arange(K) < n[:, None], ids, -1)
    logits = torch.randn(N, K, dtype=torch.double).masked_fill(ids < 0, -torch.inf)
    logq = logits.log_softmax(-1)
    return ids, n, logq, logq + gumbel_noise(ids, 1, torch.arange(N), 2).double()


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_exact_density_is_that_of_the_recorded_noise(scale):
    ids, n, logq, gprime = record()
    logq.requires_grad_()
    out = soft_density(logq, gprime, noise_scale=scale)
    (score,) = torch.autograd.grad(out.sum(), logq)
    gumbel = torch.distributions.Gumbel(torch.tensor(0.0).double(), torch.tensor(1.0).double())
    for row in range(N):
        live = slice(0, int(n[row]))
        u = (gprime - logq.detach())[row, live] / scale
        expected = (gumbel.log_prob(u) - math.log(scale)).sum()
        assert out[row].item() == pytest.approx(expected.item(), rel=1e-12)
        torch.testing.assert_close(score[row, live], (1 - torch.exp(-u)) / scale)
    assert not score[ids < 0].any()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_in_the_logits_has_the_documented_form(objective):
    """dl/dz_j = s_j - q_j sum_i s_i, with s by finite differences."""
    ids, n, _, gprime = record()
    z = torch.randn(N, K, dtype=torch.double, requires_grad=True)
    live = ids >= 0
    logq = z.masked_fill(~live, -torch.inf).log_softmax(-1)
    (dz,) = torch.autograd.grad(soft_density(logq, gprime, objective=objective).sum(), z)
    step, fixed = 1e-6, logq.detach()
    score = torch.zeros(N, K, dtype=torch.double)
    for j in range(K):
        shift = torch.zeros(K, dtype=torch.double)
        shift[j] = step
        up, down = (
            soft_density(fixed + sign * shift, gprime, objective=objective) for sign in (1, -1)
        )
        score[:, j] = (up - down) / (2 * step)
    expected = score - fixed.exp() * score.sum(-1, keepdim=True)
    torch.testing.assert_close(dz, torch.where(live, expected, 0.0), rtol=1e-6, atol=1e-8)
    # A shift of the logits changes nothing.
    torch.testing.assert_close(dz.sum(-1), torch.zeros(N).double(), atol=1e-10, rtol=0)
    assert not dz[n == 1].abs().gt(1e-14).any()


def test_official_has_no_gradient_outside_of_the_clamp_and_below_the_floor():
    logq = torch.tensor([0.5, 0.3, 0.17, 0.03], dtype=torch.double).log().requires_grad_()
    u = torch.tensor([-2.0, 4.0, 0.5, 0.5])  # below, above, inside, under the floor of -3
    gprime = logq.detach() + u
    out = soft_density(logq[None], gprime[None], objective="official")
    (gradient,) = torch.autograd.grad(out.sum(), logq)
    assert gradient[:2].tolist() == [0, 0]
    assert gradient[3] == 0
    assert gradient[2].item() == pytest.approx((1 - math.exp(-0.5)) / 3, rel=1e-4)
    flat = torch.full((1, 25), 1 / 25, dtype=torch.double).log()
    assert soft_density(flat, flat, objective="official").tolist() == [0.0]


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_concrete_is_exact_with_the_common_shift_integrated_out(scale):
    _, _, logq, gprime = record()
    out = soft_density(logq, gprime, objective="concrete", noise_scale=scale)
    shifts = torch.linspace(-60, 60, 40_001, dtype=torch.double)
    for row in range(N):
        shifted = gprime[row] + shifts[:, None]
        density = soft_density(logq[row].expand_as(shifted), shifted, noise_scale=scale).exp()
        assert out[row].item() == pytest.approx(
            torch.log(torch.trapezoid(density, shifts)).item(), abs=1e-6
        )
    moved = soft_density(logq, gprime + 1.7, objective="concrete", noise_scale=scale)
    torch.testing.assert_close(moved, out)


def test_concrete_score():
    logq = torch.randn(9, K, dtype=torch.double).log_softmax(-1).requires_grad_()
    gprime = torch.randn(9, K, dtype=torch.double)
    out = soft_density(logq, gprime, objective="concrete")
    (score,) = torch.autograd.grad(out.sum(), logq)
    torch.testing.assert_close(score, 1 - K * torch.softmax(logq.detach() - gprime, -1))


def test_score_of_the_exact_density_has_mean_0_and_variance_1_on_policy():
    logq = torch.randn(K, dtype=torch.double).log_softmax(-1).expand(100_000, K)
    noise = gumbel_noise(torch.arange(K).expand(100_000, K), 4, torch.arange(100_000), 0)
    leaf = logq.clone().requires_grad_()
    (score,) = torch.autograd.grad(soft_density(leaf, logq + noise).sum(), leaf)
    assert (score.mean(0).abs() < 4 / math.sqrt(100_000)).all()
    assert (score.var(0) - 1).abs().max() < 0.05


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rows_without_slots_are_zero_with_zero_gradient(objective):
    logq = torch.full((2, 3), -torch.inf, dtype=torch.double, requires_grad=True)
    gprime = torch.full((2, 3), -torch.inf, dtype=torch.double)
    out = soft_density(logq, gprime, objective=objective, noise_scale=0.5)
    (gradient,) = torch.autograd.grad(out.sum(), logq)
    assert not out.any()
    assert not gradient.any()


@pytest.mark.parametrize("u", [-1.5, 3.0])
def test_official_by_finite_differences_on_both_sides_of_the_clamp(u):
    """The value is continuous at the edge, the slope outside is only that of the others."""
    logq = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.double).log()
    eps_logq = torch.log(logq.exp() + 1e-6)
    gprime = eps_logq + torch.tensor([u, 0.5, -0.2])
    step = 2e-3  # beyond the tolerance

    def value(shift):
        moved = logq + torch.tensor([shift, 0, 0])
        return soft_density(moved, gprime, objective="official").item()

    assert value(-1e-5) == pytest.approx(value(1e-5), abs=4e-5)
    for side in (-1, 1):
        leaf = (logq + torch.tensor([side * step, 0, 0])).requires_grad_()
        (slope,) = torch.autograd.grad(soft_density(leaf, gprime, objective="official").sum(), leaf)
        numeric = (value(side * step + 1e-5) - value(side * step - 1e-5)) / 2e-5
        assert slope[0, 0].item() == pytest.approx(numeric, rel=1e-4, abs=1e-9)
        # A larger log q is a smaller u: beyond the upper edge is the side of smaller log q.
        outside = side < 0 if u > 0 else side > 0
        assert (slope[0, 0].item() == 0.0) == outside


@pytest.mark.parametrize("bound", [-1.5, 3.0])
def test_noise_that_was_clipped_has_no_gradient_on_either_side_of_its_rounding(bound):
    logq = torch.tensor([[0.6, 0.3, 0.1]]).log()
    eps_logq = torch.log(logq.exp() + 1e-6)
    gprime = eps_logq + torch.tensor([bound, 0.5, -0.2])
    slopes = []
    for shift in (-1e-4, -1e-6, 0.0, 1e-6, 1e-4):
        leaf = (logq + shift * torch.tensor([1.0, 0.0, 0.0])).requires_grad_()
        (slope,) = torch.autograd.grad(soft_density(leaf, gprime, objective="official").sum(), leaf)
        slopes.append(slope)
        assert slope[0, 0] == 0
    torch.testing.assert_close(torch.cat(slopes), slopes[0].expand(5, 3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("which", ["logq", "gprime"])
def test_a_nan_does_not_vanish(objective, which):
    logq = torch.tensor([[0.9, 0.07, 0.03], [0.5, 0.3, 0.2]]).log()
    gprime = logq + 0.3
    for slot in range(3):  # the last is below the floor of `official`
        broken = {"logq": logq.clone(), "gprime": gprime.clone()}
        broken[which][0, slot] = torch.nan
        leaf = broken["logq"].requires_grad_()
        out = soft_density(leaf, broken["gprime"], objective=objective)
        (slope,) = torch.autograd.grad(out.sum(), leaf)
        assert out.isnan().tolist() == [True, False]
        assert slope[0, slot].isnan()
        assert slope[1].isfinite().all()


def test_bad_arguments_of_the_density_are_named():
    logq = torch.zeros(2, 3)
    for scale in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="noise_scale must be > 0"):
            soft_density(logq, logq, noise_scale=scale)
    with pytest.raises(ValueError, match="one shape"):
        soft_density(logq, logq[:, :2])


def test_score_of_the_concrete_density_has_mean_0_and_variance_n_minus_1_over_n_plus_1():
    logq = torch.randn(K, dtype=torch.double).log_softmax(-1).expand(100_000, K)
    noise = gumbel_noise(torch.arange(K).expand(100_000, K), 4, torch.arange(100_000), 0)
    leaf = logq.clone().requires_grad_()
    density = soft_density(leaf, logq + noise, objective="concrete")
    (score,) = torch.autograd.grad(density.sum(), leaf)
    variance = (K - 1) / (K + 1)
    assert (score.mean(0).abs() < 4 * math.sqrt(variance / 100_000)).all()
    assert (score.var(0) - variance).abs().max() < 0.02
    assert score.sum(-1).abs().max() < 1e-12


@pytest.mark.parametrize("tau", [0.7, 1.5])
def test_concrete_density_integrates_to_1_over_the_simplex(tau):
    """In the mixture w = softmax(g'/tau) the density gains tau^(n-1) / prod w."""
    steps = 1500
    edge = (torch.arange(steps, dtype=torch.double) + 0.5) / steps
    first, second = torch.meshgrid(edge, edge, indexing="ij")
    # The map (a, b) -> (a, (1 - a) b) of the square onto the triangle avoids its cut cells.
    w = torch.stack([first, (1 - first) * second, (1 - first) * (1 - second)], -1).view(-1, 3)
    area = (1 - first).flatten() / steps**2
    logq = torch.tensor([0.5, 0.3, 0.2], dtype=torch.double).log().expand_as(w)
    density = soft_density(logq, tau * w.log(), objective="concrete")
    density = (density - w.log().sum(-1)).exp() * tau**2
    assert (density * area).sum().item() == pytest.approx(1.0, abs=5e-3)
