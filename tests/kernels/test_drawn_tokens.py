"""Methods that draw their token from p and feed another mixture, against NumPy."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from softgrpo_kernels import gumbel_noise, soft_token, soft_weights
from softgrpo_kernels.extension import cpu_extension
from softgrpo_kernels.methods import MULTIPLEX, NOISES, method_of, objectives_of
from softgrpo_kernels.methods.method import Rollout

ROWS, K = 40, 12
SCALES = {"multiplex": 5.0, "multiplex_weighted": 5.0, "mixture_of_inputs": 0.7, "mean": 1.0}
BACKENDS = ["reference", *(["cpu"] if cpu_extension() else [])]
P = torch.tensor([0.5, 0.3, 0.12, 0.06, 0.02], dtype=torch.float64)


def draw(noise, backend="reference", **settings):
    """Rows from confident to open, and what they were drawn with."""
    z = torch.randn(ROWS, 60, generator=torch.Generator().manual_seed(0))
    z *= torch.linspace(0.1, 12.0, ROWS)[:, None]
    keys = {"position": torch.arange(ROWS), "uid": 7, "seed": 11, "stream": 1}
    settings = {"noise_scale": SCALES[noise], "gumbel_tau": 1.0, **keys, **settings}
    return z, soft_token(
        z, torch.eye(60), noise=noise, top_k=10, top_p=0.95, k_max=K, backend=backend, **settings
    )


def expected(noise, z, out, row):
    """(token, count of the draws, weights by token id) of a row, in NumPy."""
    order = np.argsort(-z[row].numpy(), kind="stable")[:10]
    p = np.exp(z[row].numpy()[order].astype(np.float64) - z[row].numpy().max())
    p /= p.sum()
    kept = np.cumsum(p) - p < 0.95
    ids, p = order[kept], p[kept] / p[kept].sum()
    counts, winners = np.zeros(60, dtype=int), []
    for d in range(int(SCALES[noise]) if "multiplex" in noise else 1):
        noise_of_ids = gumbel_noise(
            torch.tensor(ids)[None], 11, torch.tensor([row]), 7, 1 + (d << 16)
        )
        winners.append(ids[np.argmax(np.log(p) + noise_of_ids[0].numpy())])
        counts[winners[-1]] += 1
    dense = np.zeros(60)
    dense[ids] = p
    one_hot = np.arange(60) == winners[0]
    beta = SCALES[noise]
    entropy = -(p * np.log(p)).sum() / np.log(len(p)) if len(p) > 1 else 0.0
    weights = {
        "multiplex": counts / counts.sum(),
        "multiplex_weighted": counts * dense / (counts * dense).sum(),
        "mixture_of_inputs": entropy * (dense + beta * one_hot) / (1 + beta)
        + (1 - entropy) * one_hot,
        "mean": dense,
    }[noise]
    return winners[0], counts, weights, set(ids.tolist())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("noise", SCALES)
def test_token_set_and_weights(noise, backend):
    z, out = draw(noise, backend)
    assert torch.equal(out.weights, soft_weights(out.gprime, out.kind, 1.0))
    for row in range(ROWS):
        token, counts, weights, ids = expected(noise, z, out, row)
        assert int(out.token[row]) == token
        assert set(out.ids[row, : int(out.n[row])].tolist()) == ids
        assert (out.ids[row, int(out.n[row]) :] == -1).all()
        np.testing.assert_allclose(out.embed[row].numpy(), weights, rtol=3e-5, atol=1e-7)
        if "multiplex" in noise:
            found = method_of(noise).counts(out.gprime[row], SCALES[noise]).int().numpy()
            live = out.ids[row].numpy() >= 0
            assert (found[~live] == 0).all()
            assert (found[live] == counts[out.ids[row].numpy()[live]]).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("noise", SCALES)
def test_the_others_follow_best_first(noise, backend):
    _, out = draw(noise, backend)
    behind = 0
    for row in range(ROWS):
        n = int(out.n[row])
        pairs = list(zip((-out.gprime[row, 1:n]).tolist(), out.ids[row, 1:n].tolist(), strict=True))
        assert pairs == sorted(pairs)
        behind += bool((out.gprime[row, 1:n] > out.gprime[row, 0]).any())
    assert behind > 0 or noise == "mixture_of_inputs"  # whose token is mostly the heaviest


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_draw_is_a_discrete_token(backend):
    """Bit for bit; the weights are one-hot, the set is the same."""
    z, one = draw("multiplex", backend, noise_scale=1.0)
    discrete = soft_token(
        z, torch.eye(60), mode=1, top_k=10, top_p=0.95, k_max=K, seed=11, uid=7, stream=1,
        position=torch.arange(ROWS), backend=backend,
    )  # fmt: skip
    for name in ("token", "token_logp", "n", "weights", "embed"):
        assert torch.equal(getattr(one, name), getattr(discrete, name)), name
    assert torch.equal(one.ids.sort().values, discrete.ids.sort().values)
    assert (one.gprime[:, 0] == 0).all()


@pytest.mark.parametrize("noise", SCALES)
def test_the_token_is_a_draw_from_p(noise):
    rows = 100_000
    z = P.log().float().expand(rows, 5)
    out = soft_token(
        z, noise=noise, noise_scale=SCALES[noise], gumbel_tau=1.0, top_k=5, k_max=5,
        position=torch.arange(rows), seed=3,
    )  # fmt: skip
    observed = out.token.bincount(minlength=5).numpy()
    assert stats.chisquare(observed, P.numpy() * rows).pvalue > 1e-4
    assert (out.n == 5).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("noise", SCALES)
def test_a_terminal_token_stands_alone_and_keeps_the_record(noise, backend):
    _, free = draw(noise, backend)
    _, out = draw(noise, backend, terminal_ids=free.token[:, None])
    assert (out.kind == 0).all()
    assert torch.equal(out.gprime, free.gprime)
    assert torch.equal(out.ids, free.ids)
    assert torch.equal(out.embed.argmax(-1).int(), out.token)
    assert (out.weights.sum(-1) == 1).all()
    heavy = torch.where(free.ids == free.ids[:, :1], -1, free.ids)  # of all but the token
    _, out = draw(noise, backend, terminal_ids=heavy)
    assert (out.kind == 1).all()


def test_low_bits_hold_the_count_and_barely_move_the_weight():
    method = method_of("multiplex_weighted")
    logp = -torch.logspace(-9, 3, 400)
    for count in (1, 2, 3, 32, 64):
        counts = torch.full_like(logp, count)
        gprime = method.log_weights(counts, logp, counts)
        assert (method.counts(gprime, 64.0) == count).all()
        exact = np.log(count) + logp.double().numpy()
        change = np.abs(gprime.double().numpy() - exact)
        # The sum's own rounding, and the logarithm's, are 2^-23 of the larger term.
        slack = 2.0**-22 * np.maximum(np.abs(logp.double().numpy()), 5)
        assert (change <= np.maximum(2.0**-18 * np.abs(exact), 2.0**-19) + slack).all()
    gprime = torch.tensor([-torch.inf, torch.nan])
    assert method.counts(gprime, 3.0)[0] == 0
    assert method.counts(gprime, 3.0)[1].isnan()


def record_of(counts, noise):
    """g' [N, n] of candidates that were drawn so often."""
    counts = torch.as_tensor(counts, dtype=torch.float32)
    method, draws = method_of(noise), counts.sum(-1, keepdim=True)
    logp = P[: counts.shape[-1]].log().float().expand_as(counts)
    gprime = method.log_weights(counts.clamp(min=1), logp, draws)
    return gprime.masked_fill(counts == 0, -torch.inf).double()


@pytest.mark.parametrize("noise", ["multiplex", "multiplex_weighted"])
@pytest.mark.parametrize("objective", ["exact", "slot_mean", "per_slot"])
def test_the_density_of_draws_and_its_gradient(noise, objective):
    counts = np.array([[3, 1, 0, 1, 0], [0, 0, 5, 0, 0], [1, 1, 1, 1, 1]])
    z = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z.requires_grad_()
    method, rollout = method_of(noise, objective), Rollout(noise_scale=5.0, tau=1.0)
    logq = z.log_softmax(-1)
    density = method.density(logq, record_of(counts, noise), rollout)
    share = 5 if objective == "slot_mean" else 1
    np.testing.assert_allclose(
        density.detach(), (counts * logq.detach().numpy()).sum(-1) / share, rtol=1e-12
    )
    (grad,) = torch.autograd.grad(density.sum(), z, retain_graph=True)
    np.testing.assert_allclose(
        grad, (counts - 5 * logq.detach().exp().numpy()) / share, rtol=1e-12, atol=1e-14
    )
    terms, weights = method.slot_terms(logq, record_of(counts, noise), rollout)
    torch.testing.assert_close((terms * weights).sum(-1), density)
    if method.per_slot:
        assert terms.shape == counts.shape
        np.testing.assert_array_equal(weights, counts)
    else:
        assert terms.shape == (3, 1)


@pytest.mark.parametrize("noise", ["mixture_of_inputs", "mean"])
def test_a_mixture_is_scored_by_its_token(noise):
    logq = P.log().expand(2, 5).clone().requires_grad_()
    gprime = logq.detach().clone()
    gprime[:, 3] = -torch.inf  # still in the set: q is not renormalised
    density = method_of(noise, "token").density(logq, gprime, Rollout())
    np.testing.assert_allclose(density.detach(), np.log([0.5, 0.5]))
    assert torch.autograd.grad(density.sum(), logq)[0].tolist() == [[1.0, 0, 0, 0, 0]] * 2


@pytest.mark.parametrize("noise", NOISES[MULTIPLEX:])
def test_a_dead_row_is_0_and_a_nan_shows(noise):
    gprime = torch.tensor([[-torch.inf] * 3, [-1.0, torch.nan, -torch.inf]])
    logq = torch.full((2, 3), -torch.inf)
    logq[1] = torch.tensor([0.5, 0.3, 0.2]).log()
    for objective in objectives_of(noise):
        density = method_of(noise, objective).density(logq, gprime, Rollout(noise_scale=3.0))
        assert density[0] == 0
        assert density[1].isnan()


@pytest.mark.parametrize("noise", ["multiplex", "multiplex_weighted"])
def test_ending_and_not_ending_have_mass_1(noise):
    """A terminal slot 0 is scored alone: what was drawn behind it adds up to 1."""
    q, terminal, draws = P[:3].numpy() / P[:3].numpy().sum(), 1, 3
    method = method_of(noise)
    mass = q[terminal]
    for tokens in itertools.product(range(3), repeat=draws):
        if tokens[0] != terminal:
            counts = np.bincount(tokens, minlength=3)[None]
            logq = torch.tensor(np.log(q))[None]
            rollout = Rollout(noise_scale=float(draws))
            mass += float(method.density(logq, record_of(counts, noise), rollout).exp())
    assert mass == pytest.approx(1.0, abs=1e-12)
    assert method.ending == "candidates"
    assert method.ending_scale(draws) == 1.0
