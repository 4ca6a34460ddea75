"""Mixtures of embeddings."""

import pytest
import torch

from softgrpo_kernels import soft_embedding
from softgrpo_kernels.extension import cpu_extension
from softgrpo_kernels.reference import soft_embedding as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_extension = pytest.mark.skipif(cpu_extension() is None, reason="no C++ extension")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def mixture(rows, k, vocabulary, hidden, dtype):
    ids = torch.randint(0, vocabulary, (rows, k), dtype=torch.int32)
    ids[torch.rand(rows, k) < 0.2] = -1
    weights = torch.rand(rows, k).masked_fill(torch.rand(rows, k) < 0.2, 0.0)
    return ids, weights, torch.randn(vocabulary, hidden).to(dtype)


@needs_extension
@pytest.mark.parametrize("isa", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
# Above and below the size for threads; a partial vector; one slot.
@pytest.mark.parametrize(("rows", "k", "hidden"), [(80, 30, 576), (3, 5, 100), (2, 1, 7)])
def test_cpp_has_the_bits_of_the_reference(dtype, rows, k, hidden, isa):
    ids, weights, table = mixture(rows, k, 50, hidden, dtype)
    cpu_extension().limit_isa(isa)
    try:
        out = soft_embedding(ids, weights, table)
    finally:
        cpu_extension().limit_isa(2)
    assert torch.equal(out, reference.soft_embedding(ids, weights, table))


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_weighted_sum_rounded_once(dtype):
    ids, weights, table = mixture(20, 6, 30, 33, dtype)
    live = ids >= 0
    exact = torch.einsum(
        "nk,nkh->nh", (weights * live).double(), table[ids.clamp(min=0).long()].double()
    )
    error = (soft_embedding(ids, weights, table).double() - exact).abs()
    ulp = torch.finfo(dtype).eps * exact.abs().clamp(min=1e-2)
    # Half an ulp of the dtype, and what fp32 loses in six additions.
    assert (error <= 0.51 * ulp + 1e-6).all()


def test_unused_slots_are_never_read():
    table = torch.randn(4, 8)
    table[3] = torch.nan
    ids = torch.tensor([[0, 3, -1]], dtype=torch.int32)
    out = soft_embedding(ids, torch.tensor([[0.5, 0.0, torch.nan]]), table)
    assert torch.equal(out, 0.5 * table[:1])


def test_one_hot_returns_the_row_itself():
    table = torch.randn(9, 16).bfloat16()
    out = soft_embedding(torch.tensor([[4, -1]]), torch.tensor([[1.0, 0.0]]), table[:, ::2])
    assert torch.equal(out[0], table[4, ::2])
    stacked = soft_embedding(torch.tensor([[[4], [2]]]), torch.ones(1, 2, 1), table)
    assert torch.equal(stacked, table[[4, 2]][None])


def test_gradients():
    ids = torch.tensor([[0, 2, -1], [2, 2, 1]])
    weights = torch.rand(2, 3, dtype=torch.double, requires_grad=True)
    table = torch.randn(5, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, e: soft_embedding(ids, w, e), (weights, table))
    out = soft_embedding(ids, weights, table)
    expected = reference.soft_embedding(ids, weights, table)
    cotangent = torch.randn_like(out)
    ours = torch.autograd.grad(out, (weights, table), cotangent)
    theirs = torch.autograd.grad(expected, (weights, table), cotangent)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_mixture_of_nothing_is_zero(dtype):
    table = torch.randn(5, 7).to(dtype).requires_grad_()
    ids, weights = torch.empty(3, 0, dtype=torch.int32), torch.empty(3, 0, requires_grad=True)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        out = soft_embedding(ids, weights, table)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(out, torch.zeros(3, 7, dtype=dtype))
    assert torch.equal(torch.autograd.grad(out.sum(), table)[0], torch.zeros_like(table))


def test_bad_input_is_named():
    table = torch.randn(5, 4)
    with pytest.raises(ValueError, match="ids: 5 is no row of embed, which has 5"):
        soft_embedding(torch.tensor([[5]]), torch.ones(1, 1), table)
    with pytest.raises(ValueError, match="one shape"):
        soft_embedding(torch.tensor([[1]]), torch.ones(1, 2), table)
    with pytest.raises(ValueError, match="weights is on meta"):
        soft_embedding(torch.tensor([[1]]), torch.ones(1, 1, device="meta"), table)
