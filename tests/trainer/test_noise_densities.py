"""Dirichlet and Gaussian noise: densities against scipy, and scores on what the op draws."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from softgrpo.algorithm.density import log_densities
from softgrpo.algorithm.positions import DensitySettings
from softgrpo_kernels import gumbel_noise, soft_token
from softgrpo_kernels.methods import method_of
from softgrpo_kernels.methods.method import Rollout

LOGITS = torch.tensor([0.9, 0.2, -0.4, -1.5], dtype=torch.float64)
DRAWS = 200_000
DIRICHLET, GAUSSIAN = method_of("dirichlet"), method_of("gaussian")


def draw(noise, scale, n=DRAWS):
    """ids and g' of n positions that the op draws from LOGITS."""
    out = soft_token(
        LOGITS.float().expand(n, 4), top_k=4, k_max=5, top_p=1.0, gumbel_tau=1.0, noise=noise,
        noise_scale=scale, position=torch.arange(n), seed=2,
    )  # fmt: skip
    assert out.ids.shape[1] == 5  # a slot that nobody uses: the densities must not see it
    return out.ids.long(), out.gprime.double()


def log_q(ids, logits=LOGITS):
    """log q of the recorded ids, unused slots -inf."""
    return torch.where(ids >= 0, logits.log_softmax(-1)[ids.clamp(min=0)], -math.inf)


def weights_of(ids, gprime):
    return torch.zeros(len(ids), 4).double().scatter_(1, ids.clamp(min=0)[:, :4], gprime.exp())


@pytest.mark.parametrize("concentration", [1.0, 7.0])
def test_dirichlet_density_equals_scipy(concentration):
    ids, gprime = draw("dirichlet", concentration, n=50)
    ours = DIRICHLET.density(log_q(ids), gprime, Rollout(concentration))
    law = stats.dirichlet(concentration * LOGITS.softmax(-1).numpy())
    for row, x in enumerate(weights_of(ids, gprime).numpy()):
        if x.min() < 1e-12:  # scipy insists on weights that add up to 1 in their last bit
            continue
        expected = law.logpdf(x / x.sum()) + np.log(x).sum()  # against dx: see the docstring
        assert ours[row].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_dirichlet_ratios_survive_fp32_where_a_candidate_is_improbable():
    """q down to 1e-12: log x is then about -1e12."""
    logits = torch.tensor([0.0, -3.0, -9.0, -20.0, -28.0], dtype=torch.float64)
    old, new = logits.log_softmax(-1), (1.003 * logits).log_softmax(-1)
    out = soft_token(
        logits.float().expand(500, 5), top_k=5, k_max=5, top_p=1.0, gumbel_tau=1.0,
        noise="dirichlet", position=torch.arange(500),
    )  # fmt: skip
    ids = out.ids.long()
    exact = DIRICHLET.density(new[ids], out.gprime.double(), Rollout(1.0))
    exact -= DIRICHLET.density(old[ids], out.gprime.double(), Rollout(1.0))
    ours = DIRICHLET.density(new[ids].float(), out.gprime, Rollout(1.0))
    ours -= DIRICHLET.density(old[ids].float(), out.gprime, Rollout(1.0))
    assert out.gprime.min() < -1e10
    torch.testing.assert_close(ours.double(), exact, atol=1e-4, rtol=1e-3)
    assert exact.abs().max() > 0.01


@pytest.mark.parametrize("sigma", [0.05, 0.3])
def test_gaussian_density_equals_scipy(sigma):
    ids, gprime = draw("gaussian", sigma, n=50)
    ours = GAUSSIAN.density(log_q(ids), gprime, Rollout(sigma))
    p, censored = LOGITS.softmax(-1).numpy(), 0
    for row, x in enumerate(weights_of(ids, gprime).numpy()):
        terms = np.where(
            x > 1.001e-6, stats.norm(p, sigma).logpdf(x), stats.norm(p, sigma).logcdf(1e-6)
        )
        censored += (x < 1.001e-6).sum()
        assert ours[row].item() == pytest.approx(terms.sum(), rel=1e-5, abs=1e-5)
    assert censored > 0  # both branches are reached


@pytest.mark.parametrize(("noise", "scale"), [("dirichlet", 3.0), ("gaussian", 0.2)])
def test_score_has_mean_0_and_gives_the_gradient_of_an_expectation(noise, scale):
    """Of the op's own draws: E[score] = 0, E[x . v * score] = d/dz E[x . v] in closed form."""
    ids, gprime = draw(noise, scale)
    leaf = LOGITS.expand(DRAWS, 4).clone().requires_grad_()
    logq = leaf.log_softmax(-1).gather(1, ids.clamp(min=0))
    logq = torch.where(ids >= 0, logq, -math.inf)
    method_of(noise).density(logq, gprime, Rollout(scale)).sum().backward()
    score = leaf.grad
    error = score.std(0) / math.sqrt(DRAWS)
    assert (score.mean(0).abs() < 4.5 * error).all()
    values = torch.tensor([1.0, -0.5, 0.3, 2.0], dtype=torch.float64)
    reward = weights_of(ids, gprime) @ values
    products = (reward - reward.mean())[:, None] * score
    p = LOGITS.softmax(-1)
    # dE[x_i]/dp_i: 1 of a Dirichlet; of a normal number cut off at 0 the chance to be above.
    slope = values if noise == "dirichlet" else values * torch.special.ndtr(p / scale)
    expected = p * (slope - p @ slope)
    error = products.std(0) / math.sqrt(DRAWS)
    assert ((products.mean(0) - expected).abs() < 4.5 * error).all()
    assert (expected.abs() > 10 * error).any()  # the comparison has power


@pytest.mark.parametrize("method", [DIRICHLET, GAUSSIAN], ids=["dirichlet", "gaussian"])
def test_one_candidate_and_dead_rows_have_no_gradient(method):
    logq = torch.tensor([[0.0, -math.inf], [-math.inf, -math.inf], [0.0, -200.0]])
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, -200.0]], requires_grad=True)
    gprime = torch.tensor([[0.0, -math.inf], [-math.inf, -math.inf], [0.0, math.log(1e-6)]])
    live = gprime > -math.inf
    logq = torch.where(live, logits.masked_fill(~live, -1e30).log_softmax(-1), -math.inf)
    out = method.density(logq, gprime, Rollout(0.5))
    assert out.isfinite().all()
    out.sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[:2].abs().max() < 1e-6


def batch_of(ids, gprime, kind):
    """One-token responses, drawn by the op above."""
    from softgrpo.rollout.batch import RolloutBatch
    from softgrpo_engine import SoftTokens

    n = len(ids)
    return RolloutBatch(
        prompt_ids=torch.zeros(1, dtype=torch.int32),
        prompt_lens=torch.ones(1, dtype=torch.int32),
        group=torch.zeros(n, dtype=torch.int32),
        response_lens=torch.ones(n, dtype=torch.int32),
        soft=SoftTokens(
            ids.int(), gprime.float(), kind, torch.zeros(n, dtype=torch.bool), ids[:, 0].int()
        ),
        logprobs=torch.zeros(n),
        uid=torch.arange(n),
        finish=torch.zeros(n, dtype=torch.uint8),
        seed=0,
        stream=0,
        weight_version=torch.zeros(n, dtype=torch.int64),
    )


@pytest.mark.parametrize(
    ("noise", "scale"), [("gumbel", 1.0), ("gumbel", 0.5), ("dirichlet", 3.0), ("gaussian", 0.2)]
)
def test_the_score_has_mean_0_where_the_first_token_ends_the_phase(noise, scale):
    """Token 1 is the end of thinking: a discrete position, whose score must fill what the soft
    positions of the other tokens leave open."""
    n = 100_000
    ids, gprime = draw(noise, scale, n)
    batch = batch_of(ids, gprime, (ids[:, 0] != 1).to(torch.uint8))
    settings = DensitySettings(method_of(noise), noise_scale=scale)
    positions = batch.positions(settings)
    classes = positions.classes
    assert classes.soft_phase.all()
    assert classes.soft.all() == (noise != "gumbel")
    leaf = LOGITS.expand(n, 4).clone().requires_grad_()
    logq = leaf.log_softmax(-1).gather(1, ids.clamp(min=0))
    logq = torch.where(ids >= 0, logq, -math.inf)
    log_densities(logq, torch.zeros(n), positions, settings).sum().backward()
    error = leaf.grad.std(0) / math.sqrt(n)
    assert (leaf.grad.mean(0).abs() < 4.5 * error).all()


def test_gumbel_noise_of_another_scale_draws_from_the_power_of_p():
    """What the score of the ending token above rests on."""
    noise = gumbel_noise(torch.arange(4).expand(DRAWS, 4), 5, torch.arange(DRAWS), 0)
    token = (LOGITS + 0.5 * noise).argmax(-1)
    shares = token.bincount(minlength=4) / DRAWS
    torch.testing.assert_close(shares.double(), (LOGITS / 0.5).softmax(-1), atol=5e-3, rtol=0)
