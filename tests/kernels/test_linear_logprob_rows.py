"""The routed log-density: soft and discrete rows, maps of the logits, kinds of gradient."""

import pytest
import torch

from softgrpo_kernels import (
    gumbel_noise,
    linear_candidate_logprob,
    linear_soft_logprob,
    linear_token_logprob,
    soft_token,
)
from softgrpo_kernels.reference import linear_logprob as dense

N, V, H, K = 7, 40, 6, 5
OBJECTIVES = ["exact", "official", "concrete"]
# bias, softcap, logit_scale: none, Gemma's, Cohere's, all.
MAPS = {
    "plain": {},
    "softcap": {"softcap": 2.5},
    "scale": {"logit_scale": 0.4},
    "all": {"bias": True, "softcap": 2.5, "logit_scale": 0.4},
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def problem(dtype=torch.double, rows=N):
    """Hidden states, weights, bias, ids that differ in a row (some unused), their number, g'."""
    hidden = torch.randn(rows, H, dtype=torch.double).to(dtype).requires_grad_()
    head = torch.randn(V, H, dtype=torch.double).to(dtype).requires_grad_()
    bias = torch.randn(V, dtype=torch.double).to(dtype).requires_grad_()
    ids = torch.stack([torch.randperm(V)[:K] for _ in range(rows)]).int()
    n = 1 + torch.arange(rows) % K
    ids = torch.where(torch.arange(K) < n[:, None], ids, -1)
    logq = dense.linear_candidate_logprob(hidden.double(), head.double(), ids).detach()
    noise = gumbel_noise(ids, 1, torch.arange(rows), 2).double()
    return hidden, head, bias, ids, n, logq + noise


def gradients(value, *inputs, **options):
    cotangent = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view_as(value)
    return torch.autograd.grad((value * cotangent).sum(), inputs, **options)


def mixed(rows=N):
    kind = (torch.arange(rows) % 3 > 0).to(torch.uint8)
    return kind, torch.randint(0, V, (rows,), dtype=torch.int32)


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
    logq = dense.linear_candidate_logprob(hidden, head, ids)
    gprime = logq.detach() + noise
    expected = authors_density(torch.softmax(hidden @ head.T, -1), ids, gprime)
    soft, n = torch.ones(200, dtype=torch.uint8), torch.full((200,), K)
    out = linear_soft_logprob(hidden, head, ids, gprime, n, soft, n * 0, objective="official")
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)
    theirs = gradients(expected, hidden, head)
    for a, b in zip(gradients(out, hidden, head), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_official_gradients_do_not_hang_on_rounding(seed):
    """On policy, where the noise that was clipped lies on the bounds: weights 1e-7 apart."""
    torch.manual_seed(seed)
    hidden, head = torch.randn(300, 32), 0.4 * torch.randn(V, 32)
    drawn = soft_token(
        hidden @ head.T, top_k=K, k_max=K, eps=1e-6, noise_clamp=(-1.5, 3.0),
        position=torch.arange(300),
    )  # fmt: skip

    def gradient(weights):
        leaf = weights.clone().requires_grad_()
        out = linear_soft_logprob(
            hidden, leaf, drawn.ids, drawn.gprime, drawn.n, drawn.kind, drawn.token,
            objective="official",
        )  # fmt: skip
        return gradients(out, leaf)[0]

    expected = gradient(head)
    for _ in range(3):
        moved = gradient(head * (1 + 1e-7 * torch.randn_like(head)))
        assert (moved - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("options", MAPS.values(), ids=MAPS)
def test_soft_logprob_is_that_of_the_dense_logits(objective, options):
    hidden, head, bias, ids, n, gprime = problem()
    kind, label = mixed()
    options = dict(options, temperature=torch.linspace(0.5, 2, N).double())
    inputs = [hidden, head]
    if "bias" in options:
        options["bias"] = bias
        inputs.append(bias)
    garbage = torch.where(ids < 0, V - 1, ids)  # slots from n on are not to be read
    out = linear_soft_logprob(
        hidden, head, garbage, gprime.nan_to_num(0.0, neginf=5.0), n, kind, label,
        objective=objective, need_entropy=True, **options,
    )  # fmt: skip
    alone = linear_soft_logprob(
        hidden, head, garbage, gprime, n, kind, label, objective=objective, **options
    )
    expected = dense.linear_soft_logprob(
        hidden, head, ids, gprime, kind, label, objective, **options
    )
    for ours, true in ((torch.stack(out), torch.stack(expected)), (alone, expected[0])):
        torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-13)
        theirs = gradients(true, *inputs, retain_graph=True)
        for a, b in zip(gradients(ours, *inputs), theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_soft_logprob_passes_gradcheck(objective):
    hidden, head, bias, ids, n, gprime = problem(rows=4)
    kind, label = torch.tensor([0, 1, 1, 1]), torch.randint(0, V, (4,))
    assert torch.autograd.gradcheck(
        lambda x, w, b: linear_soft_logprob(
            x, w, ids, gprime, n, kind, label, temperature=0.7, objective=objective,
            bias=b, softcap=3.0, logit_scale=0.8, need_entropy=True,
        ),
        (hidden, head, bias),
    )  # fmt: skip


def test_rows_that_share_ids_add_up_and_others_stay_zero():
    hidden, head, _, ids, n, gprime = problem(rows=40)
    ids = torch.where(ids >= 0, ids % 6, -1)  # the same few tokens, twice in a row too
    kind, label = torch.ones(40, dtype=torch.uint8), torch.zeros(40, dtype=torch.int64)
    out = linear_soft_logprob(hidden, head, ids, gprime, n, kind, label)
    expected, _ = dense.linear_soft_logprob(hidden, head, ids, gprime, kind, label)
    ours, theirs = (gradients(x, hidden, head) for x in (out, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert not ours[1][6:].any()
    assert ours[1][:6].any(-1).all()
    # One candidate is certain: no gradient, to the bit.
    assert not ours[0][n == 1].any()


def test_no_rows_and_rows_without_candidates():
    hidden, head, _, ids, n, gprime = problem()
    kind, label = mixed()
    out = linear_soft_logprob(hidden, head, ids, gprime, n * 0, kind * 0 + 1, label)
    assert not out.any()
    assert not any(g.any() for g in gradients(out, hidden, head))
    empty = linear_soft_logprob(*(x[:0] if x is not head else x for x in (
        hidden, head, ids, gprime, n, kind, label)))  # fmt: skip
    assert empty.shape == (0,)
    assert not gradients(empty, head)[0].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_accumulate_adds_to_the_gradient_that_is_there(dtype):
    hidden, head, _, ids, n, gprime = problem(dtype)
    kind, label = mixed()

    def run(grad_weight):
        out = linear_soft_logprob(
            hidden, head, ids, gprime, n, kind, label, grad_weight=grad_weight
        )
        (out * torch.linspace(-1, 2, N, dtype=out.dtype)).sum().backward()
        result = (out.detach(), hidden.grad, head.grad)
        hidden.grad = None
        return result

    plain = run("dense")
    head.grad = None
    added = run("accumulate")
    assert all(torch.equal(a, b) for a, b in zip(plain, added, strict=True))
    buffer = head.grad
    twice = run("accumulate")[2]
    assert twice is buffer
    tolerance = torch.finfo(dtype).eps * 4
    torch.testing.assert_close(twice, 2 * plain[2], rtol=tolerance, atol=tolerance)


def test_accumulate_rounds_nothing_into_a_gradient_of_a_wider_dtype():
    hidden, head, _, ids, *_ = problem(torch.bfloat16)
    head.grad_dtype = torch.float32
    _, label = mixed()
    exact = [x.detach().double().requires_grad_() for x in (hidden, head)]
    for (x, weight), way in (((hidden, head), "accumulate"), (exact, "dense")):
        logq = linear_candidate_logprob(x, weight, ids, grad_weight=way)
        logp = linear_token_logprob(x, weight, label, grad_weight=way)
        (logp.sum() + torch.where(ids >= 0, logq, 0.0).sum()).backward()
    assert head.grad.dtype == torch.float32
    assert (head.grad - exact[1].grad).abs().max() < 1e-5 * head.grad.abs().max()


def test_accumulate_works_with_a_constant_hidden():
    hidden, head, _, ids, *_ = problem()
    out = linear_candidate_logprob(hidden.detach(), head, ids, grad_weight="accumulate")
    torch.where(ids >= 0, out, 0.0).sum().backward()
    expected = linear_candidate_logprob(hidden, head, ids)
    (true,) = torch.autograd.grad(torch.where(ids >= 0, expected, 0.0).sum(), head)
    torch.testing.assert_close(head.grad, true)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_is_the_dense_gradient_without_its_zeros(dtype):
    hidden, head, _, ids, n, gprime = problem(dtype)
    kind, label = torch.ones(N, dtype=torch.uint8), torch.zeros(N, dtype=torch.int64)
    plain, sparse = (
        gradients(
            linear_soft_logprob(hidden, head, ids, gprime, n, kind, label, grad_weight=way),
            hidden, head,
        )
        for way in ("dense", "rows")
    )  # fmt: skip
    assert sparse[1].is_sparse
    assert sparse[1].is_coalesced()
    assert torch.equal(sparse[1].indices()[0], ids[ids >= 0].unique().long())
    assert torch.equal(sparse[1].to_dense(), plain[1])
    assert torch.equal(sparse[0], plain[0])


def test_bf16_error_is_no_more_than_that_of_plain_bf16():
    """Against fp64 on the same rounded inputs, with what torch gives when it computes in bf16."""
    hidden, head, _, ids, n, gprime = problem(torch.bfloat16, rows=300)
    kind, label = mixed(300)
    wide = [x.detach().double().requires_grad_() for x in (hidden, head)]
    true, _ = dense.linear_soft_logprob(*wide, ids, gprime, kind, label)
    plain, _ = dense.linear_soft_logprob(hidden, head, ids, gprime, kind, label)
    ours = linear_soft_logprob(hidden, head, ids, gprime, n, kind, label)
    cotangent = torch.linspace(-1, 2, 300)
    results = []
    for out, inputs in ((true, wide), (plain, (hidden, head)), (ours, (hidden, head))):
        grads = torch.autograd.grad((out * cotangent).sum(), inputs)
        results.append([x.double() for x in (out.detach(), *grads)])
    for exact, bf16, fused in zip(*results, strict=True):
        assert (fused - exact).norm() <= 2 * (bf16 - exact).norm()
        assert (fused - exact).norm() <= 4e-3 * exact.norm()


def test_bad_input_is_named():
    hidden, head, bias, ids, n, gprime = problem()
    kind, label = mixed()
    names = ("hidden", "lm_head", "ids", "gprime", "n", "row_kind", "label")
    good = dict(zip(names, (hidden, head, ids, gprime, n, kind, label), strict=True))
    for change, message in (
        ({"n": n[:3]}, r"n must be \[7\], not \[3\]"),
        ({"gprime": gprime[:, :2]}, "gprime must be floating point"),
        ({"label": label.float()}, "label must be integers, not torch.float32"),
        ({"label": label - V}, "label must be token ids"),
        ({"ids": ids.double()}, "ids must be integers"),
        ({"ids": ids[0]}, r"ids must be \[7, K\]"),
        ({"ids": ids + V}, "ids must be token ids below 40"),
        ({"lm_head": head.float()}, "hidden is torch.float64, lm_head torch.float32"),
        ({"lm_head": head[:, :2]}, "need hidden"),
        ({"bias": bias[:5]}, r"bias must be floating point \[40\]"),
        ({"softcap": 0.0}, "softcap must be > 0 or None"),
        ({"softcap": torch.inf}, "softcap must be > 0 or None, and finite"),
        ({"logit_scale": torch.nan}, "logit_scale must be finite"),
        ({"noise_scale": torch.nan}, "noise_scale must be > 0"),
        ({"n": n + K}, "n must be 0 .. K = 5"),
        ({"n": n - 2}, "n must be 0 .. K = 5"),
        ({"row_kind": kind * 0 + 2}, r"row_kind must be 0 \(discrete\) or 1 \(soft\), not 2"),
        ({"temperature": 1e-39}, "temperature must be > 0"),
        ({"temperature": torch.nan}, "temperature must be > 0"),
        ({"temperature": torch.zeros(N)}, "temperature must be > 0"),
        ({"temperature": torch.ones(3)}, r"temperature must be a number or \[7\]"),
        ({"objective": "gumbel"}, "objective must be one of exact, official, concrete, censored"),
        ({"grad_weight": "sparse"}, "grad_weight must be dense, rows or accumulate"),
        ({"grad_weight": "rows"}, "needs every row to be soft"),
        ({"grad_weight": "accumulate", "lm_head": head * 1}, "lm_head to be a leaf"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_soft_logprob(**(good | change))
    with pytest.raises(ValueError, match="here every row of lm_head is used"):
        linear_token_logprob(hidden, head, label, grad_weight="rows")
