"""The other methods of soft thinking: each kind of noise against the law it is named after."""

import numpy as np
import pytest
import torch
from scipy import special, stats

from softgrpo_kernels import gumbel_noise, soft_token, soft_weights
from softgrpo_kernels.extension import cpu_extension
from softgrpo_kernels.methods import DIRICHLET, GAUSSIAN, GUMBEL, MULTIPLEX, NOISES

P = torch.tensor([0.5, 0.3, 0.12, 0.06, 0.02], dtype=torch.double)
DRAWS = 100_000


def draw(noise, scale, draws=DRAWS, **settings):
    """Weights by token id [draws, 5] of many positions with the probabilities P."""
    z = P.log().float().expand(draws, 5)
    out = soft_token(
        z, torch.eye(5), top_k=5, k_max=5, gumbel_tau=1.0, noise=noise, noise_scale=scale,
        position=torch.arange(draws), seed=9, **settings,
    )  # fmt: skip
    assert torch.equal(out.weights, soft_weights(out.gprime, out.kind, 1.0))
    return out.embed.double()


def test_without_noise_the_weights_are_the_probabilities():
    torch.testing.assert_close(draw("none", 1.0, draws=3)[1], P, rtol=1e-6, atol=0)


@pytest.mark.parametrize("alpha", [0.3, 4.0, 100.0])
def test_dirichlet_weights_have_beta_marginals(alpha):
    weights = draw("dirichlet", alpha)
    for token in (0, 1, 4):
        law = stats.beta(alpha * P[token], alpha * (1 - P[token]))
        # Where float32 rounds to 0 or 1 the continuous law has no comparison: test the inside.
        inside = (weights[:, token] > 1e-6) & (weights[:, token] < 1 - 1e-6)
        low, high = law.cdf([1e-6, 1 - 1e-6])
        sample = law.cdf(weights[inside, token].numpy())
        assert stats.kstest((sample - low) / (high - low), "uniform").pvalue > 1e-4
        assert stats.binomtest(int(inside.sum()), DRAWS, high - low).pvalue > 1e-4


def test_gaussian_weights_are_the_noisy_probabilities():
    sigma = 0.05
    z = P.log().float().expand(DRAWS, 5)
    out = soft_token(
        z, top_k=5, k_max=5, gumbel_tau=1.0, noise="gaussian", noise_scale=sigma,
        position=torch.arange(DRAWS),
    )  # fmt: skip
    x = torch.empty(DRAWS, 5, dtype=torch.double).scatter_(1, out.ids.long(), out.gprime.double())
    x = x.exp()
    assert float(x.min()) == pytest.approx(1e-6, rel=1e-5)
    for token in (0, 2, 4):
        above = x[:, token] > 1.01e-6
        law = stats.norm(float(P[token]), sigma)
        sample = (law.cdf(x[above, token].numpy()) - law.cdf(0)) / law.sf(0)
        assert stats.kstest(sample, "uniform").pvalue > 1e-4
        assert stats.binomtest(int(above.sum()), DRAWS, law.sf(0)).pvalue > 1e-4


@pytest.mark.parametrize("draws", [1, 3, 20])
def test_multiplex_weights_are_shares_of_independent_draws(draws):
    counts = draw("multiplex", draws) * draws
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-4)
    counts = counts.round().long()
    for token in (0, 3):
        observed = counts[:, token].bincount(minlength=draws + 1).numpy()
        expected = stats.binom(draws, float(P[token])).pmf(np.arange(draws + 1)) * DRAWS
        large = expected >= 5
        observed = [*observed[large], observed[~large].sum()]
        expected = [*expected[large], expected[~large].sum()]
        if expected[-1] < 1e-9:
            observed, expected = observed[:-1], expected[:-1]
        assert stats.chisquare(observed, expected).pvalue > 1e-4
    # Two tokens of one position: multinomial, so negatively correlated.
    covariance = np.cov(counts[:, 0], counts[:, 1])[0, 1]
    assert covariance == pytest.approx(-draws * 0.5 * 0.3, rel=0.05)


def test_the_first_multiplex_draw_is_the_discrete_token():
    z = 2 * torch.randn(200, 30, generator=torch.Generator().manual_seed(0))
    keys = {"position": torch.arange(200), "top_k": 12}
    one = soft_token(z, noise="multiplex", noise_scale=1.0, **keys)
    assert torch.equal(one.token, soft_token(z, mode=1, **keys).token)
    assert torch.equal(one.ids.sort().values, soft_token(z, mode=1, **keys).ids.sort().values)


@pytest.mark.skipif(cpu_extension() is None, reason="no C++ extension")
@pytest.mark.parametrize("isa", [0, 1, 2])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_cpp_equals_the_reference(isa, eps):
    torch.manual_seed(1)
    rows = 80
    kinds = torch.arange(rows) % len(NOISES)
    scales = torch.tensor([0.7, 1.0, 3.0, 0.1, 7.0, 5.0, 0.5, 1.0])
    settings = {
        "top_k": 17, "top_p": 0.97, "gumbel_tau": 1.0,
        "weight_floor": torch.where(kinds < MULTIPLEX, 0.3, 0.0),
        "noise": kinds, "noise_scale": scales[kinds],
        "mode": torch.where(torch.arange(rows) % 11 == 0, 1, 2), "eps": eps,
        "position": torch.arange(rows), "uid": 77, "stream": 1,
    }  # fmt: skip
    z, embed = 3 * torch.randn(rows, 700), torch.randn(700, 12)
    expected = soft_token(z, embed, **settings, backend="reference")
    cpu_extension().limit_isa(isa)
    try:
        out = soft_token(z, embed, **settings, backend="cpu")
    finally:
        cpu_extension().limit_isa(2)
    assert torch.equal(out.ids, expected.ids)
    assert torch.equal(out.n, expected.n)
    for name in ("gprime", "logp", "weights", "embed"):
        a, b = getattr(out, name), getattr(expected, name)
        # The low bits of weighted multiplex hold a count: an ulp of log p moves g' by 64.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6, msg=name)


def test_the_kind_of_noise_is_for_soft_rows():
    z = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    settings = {"top_k": 8, "position": torch.arange(4)}
    plain = soft_token(z, mode=1, **settings)
    for noise in NOISES:
        other = soft_token(z, mode=1, noise=noise, noise_scale=2.0, **settings)
        assert torch.equal(other.gprime, plain.gprime)


def test_a_slot_holds_finite_noise_however_improbable_its_token():
    z = torch.tensor([[0.0, -80.0, -200.0, -1e6]])
    for noise in NOISES:
        out = soft_token(z, torch.eye(4), top_k=4, noise=noise, gumbel_tau=1.0)
        not_drawn = noise.startswith("multiplex") & (out.weights == 0)
        assert (torch.isfinite(out.gprime) | not_drawn)[0, : int(out.n)].all(), noise
        assert int(out.n) == 4
        assert out.embed.sum() == pytest.approx(1.0)


def test_gumbel_is_the_default():
    assert NOISES[GUMBEL] == "gumbel"
    z = torch.randn(2, 9)
    out = soft_token(z, top_k=4)
    live = out.ids >= 0
    assert torch.equal(out.gprime[live], (out.logp + gumbel_noise(out.ids, 0, 0, 0))[live])


def test_digamma_of_the_log_weights():
    """E[log x_i] = digamma(alpha p_i) - digamma(alpha), of the log itself, not of log(exp)."""
    alpha = 0.05
    z = P.log().float().expand(DRAWS, 5)
    out = soft_token(
        z, top_k=5, k_max=5, noise="dirichlet", noise_scale=alpha, position=torch.arange(DRAWS)
    )
    x = torch.empty(DRAWS, 5, dtype=torch.double).scatter_(1, out.ids.long(), out.gprime.double())
    expected = special.digamma(alpha * P.numpy()) - special.digamma(alpha)
    error = stats.sem(x.numpy(), axis=0)
    assert (np.abs(x.mean(0).numpy() - expected) < 4.5 * error).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise": "uniform"}, "noise must be one of gumbel, none, dirichlet"),
        ({"noise": torch.tensor([0, 8])}, "noise must be 0 .. 7"),
        ({"noise": "dirichlet", "noise_scale": 0.0}, "Dirichlet's concentration"),
        ({"noise": "multiplex", "noise_scale": 2.5}, "number of draws"),
        ({"noise": "multiplex", "noise_scale": 65.0}, "number of draws"),
        ({"noise": "mean", "weight_floor": 0.1}, "weight_floor must be 0 with mean noise"),
        ({"noise": "gaussian", "stream": 1 << 16}, "stream must be below 2\\^16"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        soft_token(torch.randn(2, 50), top_k=5, **arguments)


def test_codes_are_those_of_the_names():
    assert [NOISES[code] for code in (DIRICHLET, GAUSSIAN, MULTIPLEX)] == [
        "dirichlet",
        "gaussian",
        "multiplex",
    ]
