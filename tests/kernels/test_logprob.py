"""Training log-probs and densities against independently written closed forms, in fp64."""

import math

import pytest
import torch

from softgrpo_kernels import (
    gumbel_noise,
    linear_candidate_logprob,
    linear_soft_logprob,
    linear_token_logprob,
    logprob,
    soft_density,
)

N, V, H, K = 7, 40, 6, 5
OBJECTIVES = ["exact", "official", "concrete"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def problem(dtype=torch.double, rows=N):
    """Hidden states, weights, different ids in a row (some slots unused), and g'."""
    hidden = torch.randn(rows, H, dtype=torch.double).to(dtype).requires_grad_()
    head = torch.randn(V, H, dtype=torch.double).to(dtype).requires_grad_()
    ids = torch.stack([torch.randperm(V)[:K] for _ in range(rows)]).int()
    n = 1 + torch.arange(rows) % K
    ids = torch.where(torch.arange(K) < n[:, None], ids, -1)
    logq = dense_candidate_logprob(hidden.double(), head.double(), ids, 1.0).detach()
    noise = gumbel_noise(ids, 1, torch.arange(rows), 2).double()
    return hidden, head, ids, n, (logq + noise)


def dense_candidate_logprob(hidden, head, ids, temperature):
    """Full softmax, gathered and renormalised: what the candidates' softmax must equal."""
    full = torch.log_softmax(hidden @ head.T / temperature, -1)
    picked = full.gather(1, ids.clamp(min=0).long())
    picked = picked.masked_fill(ids < 0, -torch.inf)
    return picked - picked.logsumexp(-1, keepdim=True)


def gradients(value, *inputs):
    """Gradients of a fixed random projection of the finite values."""
    cotangent = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view_as(value)
    total = torch.where(value.isfinite(), value, 0.0) * cotangent
    return torch.autograd.grad(total.sum(), inputs)


@pytest.fixture(params=[1 << 24, 1], ids=["one chunk", "chunks"])
def _chunks(request, monkeypatch):
    monkeypatch.setattr(logprob, "_CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("temperature", [1.0, 0.6, torch.linspace(0.5, 2, N).double()])
def test_candidate_logprob_is_the_renormalised_softmax(temperature):
    hidden, head, ids, *_ = problem()
    column = temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature
    expected = dense_candidate_logprob(hidden, head, ids, column)
    out = linear_candidate_logprob(hidden, head, ids, temperature=temperature)
    live = ids >= 0
    torch.testing.assert_close(out[live], expected[live], rtol=1e-13, atol=1e-13)
    assert (out[~live] == -torch.inf).all()
    theirs = torch.autograd.grad(
        (expected[live] * torch.linspace(-1, 2, int(live.sum()))).sum(), (hidden, head)
    )
    ours = torch.autograd.grad(
        (out[live] * torch.linspace(-1, 2, int(live.sum()))).sum(), (hidden, head)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    # Exactly nothing for tokens that are nobody's candidate.
    unused = torch.ones(V, dtype=torch.bool)
    unused[ids[live].long()] = False
    assert unused.any()
    assert not ours[1][unused].any()


def test_candidate_logprob_passes_gradcheck():
    hidden, head, ids, *_ = problem()
    live = ids >= 0
    assert torch.autograd.gradcheck(
        lambda x, w: linear_candidate_logprob(x, w, ids, temperature=0.7)[live], (hidden, head)
    )


def test_gradient_at_unused_slots_goes_nowhere():
    hidden, head, ids, *_ = problem()
    out = linear_candidate_logprob(hidden, head, ids)
    cotangent = torch.where(ids >= 0, 0.0, torch.nan).double()
    for gradient in torch.autograd.grad(out, (hidden, head), cotangent):
        assert not gradient.any()


def test_one_candidate_is_certain_and_has_no_gradient():
    hidden, head, ids, *_ = problem()
    ids[:, 1:] = -1
    out = linear_candidate_logprob(hidden, head, ids)
    assert not out[:, 0].any()
    assert not any(g.any() for g in gradients(out, hidden, head))


def test_rows_without_candidates_and_no_rows_at_all():
    hidden, head, ids, *_ = problem()
    ids[2] = -1
    out = linear_candidate_logprob(hidden, head, ids)
    assert (out[2] == -torch.inf).all()
    d_hidden, d_head = gradients(out, hidden, head)
    assert not d_hidden[2].any()
    assert d_head.isfinite().all()
    empty = linear_candidate_logprob(hidden[:0], head, ids[:0])
    assert empty.shape == (0, K)
    assert not gradients(empty, head)[0].any()


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("temperature", [1.0, torch.linspace(0.5, 2, N).double()])
def test_token_logprob_is_the_log_softmax(temperature):
    hidden, head, *_ = problem()
    label = torch.randint(0, V, (N,))
    column = temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature
    full = torch.log_softmax(hidden @ head.T / column, -1)
    expected = torch.stack([full[torch.arange(N), label], -(full.exp() * full).sum(-1)])
    logp, entropy = linear_token_logprob(
        hidden, head, label, temperature=temperature, need_entropy=True
    )
    out = torch.stack([logp, entropy])
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)
    for a, b in zip(gradients(out, hidden, head), gradients(expected, hidden, head), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_token_logprob_passes_gradcheck(monkeypatch):
    monkeypatch.setattr(logprob, "_vocabulary_slices", slices_of_seven)
    hidden, head, *_ = problem(rows=3)
    label = torch.tensor([0, V - 1, 6])
    assert torch.autograd.gradcheck(
        lambda x, w: linear_token_logprob(x, w, label, temperature=0.8, need_entropy=True),
        (hidden, head),
    )


def slices_of_seven(head, rows, dtype):
    for begin in range(0, V, 7):
        yield begin, head[begin : begin + 7].to(dtype)


def test_token_logprob_in_slices_equals_one_piece(monkeypatch):
    hidden, head, *_ = problem()
    label = torch.randint(0, V, (N,))
    whole = linear_token_logprob(hidden, head, label, need_entropy=True)
    monkeypatch.setattr(logprob, "_vocabulary_slices", slices_of_seven)
    cut = linear_token_logprob(hidden, head, label, need_entropy=True)
    for a, b in zip(whole, cut, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_backward_keeps_nothing_of_the_size_of_the_vocabulary():
    hidden, head, ids, *_ = problem()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_token_logprob(hidden, head, ids[:, 0])
        linear_candidate_logprob(hidden, head, ids)
    own = {hidden.data_ptr(), head.data_ptr()}
    assert saved
    assert max(t.numel() for t in saved if t.data_ptr() not in own) <= N * K


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_exact_density_is_that_of_the_recorded_noise(scale):
    hidden, head, ids, n, gprime = problem()
    logq = dense_candidate_logprob(hidden, head, ids, 1.0).detach().requires_grad_()
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
    _, _, ids, n, gprime = problem()
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


def authors_density(p_full, ids, gprime):
    """The released code, written down row by row: gather, renormalise, +1e-6, log, clamp, mean over
    the slots above -3."""
    out = []
    for row in range(len(ids)):
        p = p_full[row, ids[row].long()]
        logp = torch.log(p / p.sum() + 1e-6)
        u = torch.clamp(gprime[row] - logp, -1.5, 3.0)
        terms = -u - torch.exp(-u)
        mask = logp > -3
        out.append(terms[mask].mean() if bool(mask.any()) else terms.sum() * 0)
    return torch.stack(out)


def test_official_is_the_released_formula():
    hidden, head, *_ = problem(rows=200)
    ids = torch.stack([torch.randperm(V)[:K] for _ in range(200)]).int()
    noise = torch.randn(200, K).double() * 3  # a good part of it outside of the clamp
    logq = dense_candidate_logprob(hidden, head, ids, 1.0)
    gprime = logq.detach() + noise
    expected = authors_density(torch.softmax(hidden @ head.T, -1), ids, gprime)
    out = soft_density(linear_candidate_logprob(hidden, head, ids), gprime, objective="official")
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)
    for a, b in zip(gradients(out, hidden, head), gradients(expected, hidden, head), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


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
    _, _, ids, _, gprime = problem()
    logq = (gprime - gumbel_noise(ids, 1, torch.arange(N), 2).double()).masked_fill(
        ids < 0, -torch.inf
    )
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


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_soft_logprob_routes_rows_by_their_kind(objective):
    hidden, head, ids, n, gprime = problem()
    kind = (torch.arange(N) % 3 > 0).to(torch.uint8)
    label = torch.randint(0, V, (N,), dtype=torch.int32)
    garbage = torch.where(ids < 0, V - 1, ids)  # slots from n on are not to be read
    out = linear_soft_logprob(
        hidden, head, garbage, gprime.nan_to_num(0.0, neginf=5.0), n, kind, label,
        temperature=0.9, objective=objective,
    )  # fmt: skip
    logq = dense_candidate_logprob(hidden, head, ids, 0.9)
    soft = soft_density(logq, gprime, objective=objective)
    hard = torch.log_softmax(hidden @ head.T / 0.9, -1)[torch.arange(N), label.long()]
    expected = torch.where(kind == 1, soft, hard)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)
    assert torch.autograd.gradcheck(
        lambda x, w: linear_soft_logprob(x, w, ids, gprime, n, kind, label, objective=objective),
        (hidden, head),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_inputs_are_computed_in_fp32(dtype):
    hidden, head, ids, _, _ = problem(dtype, rows=300)
    label = ids[:, 0].long()
    wide = [x.detach().double().requires_grad_() for x in (hidden, head)]
    for op in (
        lambda x, w: linear_candidate_logprob(x, w, ids),
        lambda x, w: linear_token_logprob(x, w, label),
    ):
        out, exact = op(hidden, head), op(*wide)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.double(), exact, rtol=2e-6, atol=2e-6)
        for a, b in zip(gradients(out, hidden, head), gradients(exact, *wide), strict=True):
            assert a.dtype == dtype
            # One rounding to the dtype on top of fp32 sums.
            scale = b.abs().amax()
            tolerance = torch.finfo(dtype).eps / 2 * b.abs() + 1e-5 * scale
            assert ((a.double() - b).abs() <= tolerance).all()


def test_gradients_do_not_depend_on_the_threads():
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            hidden, head, ids, *_ = problem(torch.float32, rows=5000)
            results.append(gradients(linear_candidate_logprob(hidden, head, ids), hidden, head))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_bad_input_is_named():
    hidden, head, ids, n, gprime = problem()
    with pytest.raises(ValueError, match="ids must be token ids below 40"):
        linear_candidate_logprob(hidden, head, ids + V)
    with pytest.raises(ValueError, match="label must be token ids"):
        linear_token_logprob(hidden, head, ids[:, -1])
    with pytest.raises(ValueError, match=r"hidden is torch.float64, lm_head torch.float32"):
        linear_candidate_logprob(hidden, head.float(), ids)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        linear_token_logprob(hidden, head, ids[:, 0], temperature=0.0)
    with pytest.raises(ValueError, match="objective must be one of exact, official, concrete"):
        soft_density(gprime, gprime, objective="gumbel")
    with pytest.raises(ValueError, match="need ids and gprime"):
        linear_soft_logprob(hidden, head, ids, gprime, n[:3], n, n)
