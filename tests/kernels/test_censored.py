"""The density of what a mixture with a weight floor shows."""

import itertools
import math

import pytest
import torch

from softgrpo_kernels import soft_density, soft_weights

TAU = 0.1
# Dead slots are at the end of some rows.
LOGITS = torch.tensor([0.9, 0.2, -0.4, -1.5, 0.4], dtype=torch.float64)


def density(logq, gprime, floor, *, tau=TAU, scale=1.0):
    return soft_density(
        logq, gprime, objective="censored", tau=tau, weight_floor=floor, noise_scale=scale
    )


def draws(q, n, scale=1.0, seed=0):
    """log q and g' of n positions, best first, fp64."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(n, len(q), generator=generator, dtype=torch.float64)
    gprime = q.log() - scale * torch.log(-torch.log(uniform))
    gprime, order = gprime.sort(dim=-1, descending=True)
    return q.log()[order], gprime, order


def delta_of(floor, tau):
    return -tau * math.log(floor)


def score(q, n, objective="censored", seed=0, **settings):
    """d density / d logits at T = 1 of n draws, by token, and what was drawn."""
    _, gprime, order = draws(q, n, seed=seed)
    z = q.log().expand(n, -1).clone().requires_grad_()
    logq = z.log_softmax(-1).gather(1, order)
    soft_density(logq, gprime, objective=objective, **settings).sum().backward()
    return z.grad, gprime, order


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_floor_of_1_is_the_score_of_the_token_and_none_is_concrete(scale):
    logq, gprime, _ = draws(LOGITS.softmax(-1), 200, scale)
    token = (logq / scale).log_softmax(-1)[:, 0]
    torch.testing.assert_close(density(logq, gprime, 1.0, scale=scale), token)
    concrete = soft_density(logq, gprime, objective="concrete", noise_scale=scale)
    torch.testing.assert_close(density(logq, gprime, 0.0, scale=scale), concrete)
    # A floor that nothing falls below is none.
    assert (gprime[:, 0] - gprime[:, -1]).max() < delta_of(1e-300, 0.5)
    same = density(logq, gprime, 1e-300, tau=0.5, scale=scale)
    torch.testing.assert_close(same, concrete)


@pytest.mark.parametrize("floor", [1.0, 0.3, 1e-3, 0.0])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_gradient_is_that_of_finite_differences(floor, scale):
    _, gprime, order = draws(LOGITS.softmax(-1), 20, scale)
    gprime[::3, 3:] = -torch.inf

    def of_logits(z):
        z = z.expand(20, -1).gather(1, order).masked_fill(gprime == -torch.inf, -torch.inf)
        return density(z.log_softmax(-1), gprime, floor, tau=1.0, scale=scale)

    assert torch.autograd.gradcheck(of_logits, LOGITS.clone().requires_grad_())


def test_dead_rows_have_no_gradient_and_a_nan_shows():
    logq = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    gprime = torch.tensor([[-torch.inf] * 3, [0.0, torch.nan, -torch.inf]])
    out = density(logq, gprime, 0.1)
    assert out[0] == 0
    assert out[1].isnan()
    out[0].backward()
    assert not logq.grad[0].any()


def nodes(delta, n=200):
    """Gauss-Legendre nodes and weights on [0, delta]."""
    import numpy as np

    x, w = np.polynomial.legendre.leggauss(n)
    return torch.tensor(delta * (x + 1) / 2), torch.tensor(delta * w / 2)


@pytest.mark.parametrize("floor", [0.5, 0.05])
@pytest.mark.parametrize("tau", [0.3, 1.0])
@pytest.mark.parametrize("scale", [1.0, 0.6])
@pytest.mark.parametrize("n", [2, 3])
def test_it_adds_up_to_1(n, floor, tau, scale):
    """Over which candidate is the heaviest, which others count, and how far those are behind."""
    logq = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)[:n].log().log_softmax(-1)
    delta = delta_of(floor, tau)
    x, w = nodes(delta)
    far = 2 * delta + 1  # somewhere beyond
    total = 0.0
    for k in range(n):
        others = [i for i in range(n) if i != k]
        of_k = 0.0
        for m in range(n):
            for counting in itertools.combinations(others, m):
                grid = torch.cartesian_prod(*[x] * m).view(-1, m) if m else torch.zeros(1, 0)
                mass = torch.cartesian_prod(*[w] * m).view(-1, m).prod(-1) if m else torch.ones(1)
                behind = torch.full((len(grid), n), far, dtype=torch.float64)
                behind[:, k] = 0.0
                for column, i in enumerate(counting):
                    behind[:, i] = grid[:, column]
                order = behind.argsort(-1)
                value = density(logq[order], -behind.gather(1, order), floor, tau=tau, scale=scale)
                of_k += float((value.exp() * mass).sum())
        total += of_k
        # The heaviest is a draw from q^(1/c).
        assert of_k == pytest.approx(float((logq / scale).softmax(-1)[k]), rel=1e-3)
    assert total == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(
    ("q", "floor", "energy"),
    [  # of methods 2.1 in the notes on estimators: tau 0.1
        ((0.5, 0.5), 0.1, 0.55), ((0.5, 0.5), 0.001, 0.62), ((0.9, 0.1), 0.1, 0.22),
        ((0.99, 0.01), 0.01, 0.031), ((0.5, 0.2, 0.15, 0.1, 0.05), 0.1, 0.80),
        ((0.97, 0.01, 0.01, 0.005, 0.005), 0.01, 0.092),
    ],
)  # fmt: skip
def test_its_score_has_mean_0_and_little_energy(q, floor, energy):
    q, n = torch.tensor(q, dtype=torch.float64), 400_000
    grad, _, _ = score(q, n, tau=TAU, weight_floor=floor)
    error = grad.std(0) / math.sqrt(n)
    assert (grad.mean(0).abs() < 4.5 * error).all()
    measured = grad.square().sum(-1)
    spread = 4.5 * float(measured.std()) / math.sqrt(n)
    assert float(measured.mean()) == pytest.approx(energy, abs=spread + 0.006)
    discrete = 1 - float(q.square().sum())
    assert float(measured.mean()) < floor ** (-TAU) * discrete + spread


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_it_is_unbiased_for_what_the_floored_mixture_shows(tau):
    """Against `concrete`, which is for any mixture; the token's score alone is not."""
    q, n, floor = LOGITS.softmax(-1), 400_000, 0.1
    _, gprime, order = draws(q, n)
    kind = torch.ones(n, dtype=torch.uint8)
    weights = torch.zeros(n, 5, dtype=torch.float64)
    weights.scatter_(1, order, soft_weights(gprime, kind, tau, floor).double())
    # A reward that only a mixture of the second and the fifth earns.
    reward = (weights[:, 1] * weights[:, 4])[:, None]
    difference, bias = (
        reward * (score(q, n, tau=tau, weight_floor=f)[0] - score(q, n, "concrete")[0])
        for f in (floor, 1.0)
    )
    error = difference.std(0) / math.sqrt(n)
    assert (difference.mean(0).abs() < 4.5 * error).all()
    if tau == 1.0:  # the comparison has power
        assert (bias.mean(0).abs() > 10 * bias.std(0) / math.sqrt(n)).any()
