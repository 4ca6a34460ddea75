"""Training log-probs and densities against independently written closed forms, in fp64."""

import pytest
import torch

from softgrpo_kernels import (
    gumbel_noise,
    linear_candidate_logprob,
    linear_logprob_passes,
    linear_logprob_slices,
    linear_token_logprob,
)
from softgrpo_kernels.reference import indexed_dot as chunked
from softgrpo_kernels.reference import linear_logprob as dense

N, V, H, K = 7, 40, 6, 5


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
    logq = dense.linear_candidate_logprob(hidden.double(), head.double(), ids).detach()
    noise = gumbel_noise(ids, 1, torch.arange(rows), 2).double()
    return hidden, head, ids, n, (logq + noise)


def gradients(value, *inputs):
    """Gradients of a fixed random projection of the finite values."""
    cotangent = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view_as(value)
    total = torch.where(value.isfinite(), value, 0.0) * cotangent
    return torch.autograd.grad(total.sum(), inputs)


@pytest.fixture(params=[1 << 24, 1], ids=["one chunk", "chunks"])
def _chunks(request, monkeypatch):
    monkeypatch.setattr(chunked, "_CHUNK_ELEMENTS", request.param)
    monkeypatch.setattr(linear_logprob_slices, "_CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("temperature", [1.0, 0.6, torch.linspace(0.5, 2, N).double()])
def test_candidate_logprob_is_the_renormalised_softmax(temperature):
    hidden, head, ids, *_ = problem()
    expected = dense.linear_candidate_logprob(hidden, head, ids, temperature=temperature)
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
    expected = torch.stack(dense.linear_token_logprob(hidden, head, label, temperature=temperature))
    logp, entropy = linear_token_logprob(
        hidden, head, label, temperature=temperature, need_entropy=True
    )
    out = torch.stack([logp, entropy])
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)
    for a, b in zip(gradients(out, hidden, head), gradients(expected, hidden, head), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_token_logprob_passes_gradcheck(monkeypatch):
    monkeypatch.setattr(linear_logprob_passes, "vocabulary_slices", slices_of_seven)
    hidden, head, *_ = problem(rows=3)
    label = torch.tensor([0, V - 1, 6])
    assert torch.autograd.gradcheck(
        lambda x, w: linear_token_logprob(x, w, label, temperature=0.8, need_entropy=True),
        (hidden, head),
    )


def slices_of_seven(head, rows, dtype):
    for begin in range(0, V, 7):
        tokens = slice(begin, min(begin + 7, V))
        yield tokens, head[tokens].to(dtype)


def test_token_logprob_in_slices_equals_one_piece(monkeypatch):
    hidden, head, *_ = problem()
    label = torch.randint(0, V, (N,))
    whole = linear_token_logprob(hidden, head, label, need_entropy=True)
    monkeypatch.setattr(linear_logprob_passes, "vocabulary_slices", slices_of_seven)
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
    hidden, head, ids, *_ = problem()
    with pytest.raises(ValueError, match="ids must be token ids below 40"):
        linear_candidate_logprob(hidden, head, ids + V)
    with pytest.raises(ValueError, match="label must be token ids"):
        linear_token_logprob(hidden, head, ids[:, -1])
    with pytest.raises(ValueError, match=r"hidden is torch.float64, lm_head torch.float32"):
        linear_candidate_logprob(hidden, head.float(), ids)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        linear_token_logprob(hidden, head, ids[:, 0], temperature=0.0)
