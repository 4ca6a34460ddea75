"""Objectives that are no density of the mixture: `argmax` and `lepo`."""

import numpy as np
import pytest
import torch

from softgrpo_kernels import soft_density, soft_weights

Q = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05], dtype=torch.float64)
SURROGATES = ["argmax", "lepo"]


def draws(n, seed=0):
    """log q and g' of n positions, best first, fp64; their tokens."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(n, len(Q), generator=generator, dtype=torch.float64)
    gprime = Q.log() - torch.log(-torch.log(uniform))
    gprime, order = gprime.sort(dim=-1, descending=True)
    return Q.log()[order], gprime, order


def test_argmax_is_the_token_s_log_probability_among_the_live_ones():
    logq, gprime, _ = draws(50)
    gprime[::2, 3:] = -torch.inf
    ours = soft_density(logq, gprime, objective="argmax", noise_scale=0.5).numpy()
    for i, row in enumerate(logq.numpy()):
        live = row[: 3 if i % 2 == 0 else 5] / 0.5
        np.testing.assert_allclose(ours[i], live[0] - np.log(np.exp(live).sum()), rtol=1e-12)


@pytest.mark.parametrize(("tau", "floor"), [(0.1, 0.0), (1.0, 0.0), (1.0, 0.3)])
def test_lepo_weighs_log_q_by_the_mixture(tau, floor):
    logq, gprime, _ = draws(50)
    ours = soft_density(logq, gprime, objective="lepo", tau=tau, weight_floor=floor)
    weights = np.exp((gprime.numpy() - gprime.numpy()[:, :1]) / tau)
    weights[weights < floor] = 0.0
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(ours.numpy(), (weights * logq.numpy()).sum(-1), rtol=1e-6)
    one_hot = soft_density(logq, gprime, objective="lepo", tau=tau, weight_floor=1.0)
    torch.testing.assert_close(one_hot, logq[:, 0])


def test_argmax_is_unbiased_for_what_the_argmax_decides_and_biased_for_the_weights():
    n, tau = 400_000, 1.0
    _, gprime, order = draws(n)
    weights = torch.zeros(n, len(Q), dtype=torch.float64)
    mix = soft_weights(gprime.float(), torch.ones(n, dtype=torch.uint8), tau)
    weights.scatter_(1, order, mix.double())

    def gradient(reward, objective):
        z = Q.log().expand(n, -1).clone().requires_grad_()
        logq = z.log_softmax(-1).gather(1, order)
        soft_density(logq, gprime, objective=objective, tau=tau).sum().backward()
        scores = (reward - reward.mean())[:, None] * z.grad
        return scores.mean(0), scores.std(0) / n**0.5

    for reward, biased in ((order[:, 0].eq(1).double(), False), (weights[:, 1], True)):
        exact, exact_error = gradient(reward, "concrete")
        ours, error = gradient(reward, "argmax")
        far = ((ours - exact).abs() / (error**2 + exact_error**2).sqrt()).max()
        assert (far > 10) if biased else (far < 4), far


@pytest.mark.parametrize("objective", SURROGATES)
def test_dead_rows_have_no_gradient_and_a_nan_shows(objective):
    logq = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    gprime = torch.tensor([[-torch.inf] * 3, [0.0, torch.nan, -torch.inf], [0.0, -1.0, -torch.inf]])
    out = soft_density(logq, gprime, objective=objective)
    assert out[0] == 0
    assert out[1].isnan()
    assert out[2].isfinite()
    out[[0, 2]].sum().backward()
    assert not logq.grad[0].any()
    assert logq.grad[2].isfinite().all()


@pytest.mark.parametrize("objective", SURROGATES)
def test_gradient_is_that_of_finite_differences(objective):
    logq, gprime, _ = draws(10)
    gprime[::3, 3:] = -torch.inf
    assert torch.autograd.gradcheck(
        lambda x: soft_density(x, gprime, objective=objective, tau=0.7), logq.requires_grad_()
    )
