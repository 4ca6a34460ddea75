"""Gathered dot products and the sums of their gradients: C++ against fp64, bits against threads."""

import pytest
import torch

from softgrpo_kernels import indexed_dot as ops
from softgrpo_kernels.extension import cpu_extension
from softgrpo_kernels.reference import indexed_dot as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_extension = pytest.mark.skipif(cpu_extension() is None, reason="no C++ extension")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def problem(rows, k, vocabulary, width, dtype):
    """Ids that repeat within and across rows, unused slots, rows that lie apart."""
    ids = torch.randint(0, vocabulary, (rows, k), dtype=torch.int32)
    ids[torch.rand(rows, k) < 0.2] = -1
    hidden = torch.randn(rows, width + 3).to(dtype)[:, :width]
    table = torch.randn(vocabulary, width + 5).to(dtype)[:, :width]
    return hidden, table, ids, torch.randn(rows, k)


def exact(hidden, table, ids, grad):
    """(dots, d hidden, d table) in fp64."""
    one_hot = torch.nn.functional.one_hot(ids.long() + 1, len(table) + 1)[..., 1:].double()
    picked = one_hot @ table.double()
    terms = torch.einsum("nkv,nk,nh->vh", one_hot, grad.double(), hidden.double())
    return (
        torch.einsum("nkh,nh->nk", picked, hidden.double()),
        torch.einsum("nk,nkh->nh", grad.double(), picked),
        terms,
    )


@needs_extension
@pytest.mark.parametrize("isa", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
# Threads and all blocks; two blocks of columns; a partial vector; one slot, all ids the same.
@pytest.mark.parametrize(
    ("rows", "k", "vocabulary", "width"),
    [(80, 30, 60, 576), (20, 3, 9, 1100), (5, 4, 7, 37), (9, 1, 1, 16)],
)
def test_cpp_is_the_dot_product_in_fp32(rows, k, vocabulary, width, dtype, isa):
    hidden, table, ids, grad = problem(rows, k, vocabulary, width, dtype)
    cpu_extension().limit_isa(isa)
    try:
        dots = ops.indexed_dot(hidden, table, ids)
        d_hidden = ops.indexed_dot_backward_hidden(grad, table, ids, dtype)
        row_ids, values = ops.indexed_dot_backward_table(grad, hidden, ids)
        dense = ops.indexed_dot_backward_dense(grad, hidden, ids, vocabulary, dtype)
    finally:
        cpu_extension().limit_isa(2)
    true_dots, true_hidden, true_table = exact(hidden, table, ids, grad)
    torch.testing.assert_close(dots.double(), true_dots, rtol=1e-6, atol=1e-4)
    assert not dots[ids < 0].any()
    used = ids[ids >= 0].unique().long()
    assert torch.equal(row_ids, used)
    torch.testing.assert_close(values.double(), true_table[used], rtol=1e-6, atol=1e-4)
    assert torch.equal(dense[used], values.to(dtype))
    unused = torch.ones(vocabulary, dtype=torch.bool).index_fill(0, used, False)
    assert not dense[unused].any()
    half_ulp = torch.finfo(dtype).eps / 2 * true_hidden.abs()
    assert ((d_hidden.double() - true_hidden).abs() <= 1.01 * half_ulp + 1e-5).all()


@needs_extension
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adding_to_a_table_rounds_old_plus_sum_once(dtype, target):
    hidden, _, ids, grad = problem(50, 6, 40, 33, dtype)
    ids[ids == 7] = -1
    old = torch.randn(40, 33).to(target)
    out = old.clone()
    ops.indexed_dot_add_to_table(out, grad, hidden, ids)
    rows, values = ops.indexed_dot_backward_table(grad, hidden, ids)
    expected = old.clone()
    expected[rows] = (old[rows].float() + values).to(target)
    assert torch.equal(out, expected)
    assert torch.equal(out[7], old[7])


@needs_extension
def test_sums_run_in_order_of_row_and_slot():
    """Large terms that cancel only in the right order."""
    hidden = torch.tensor([[1e8], [1.0], [-1e8], [1.0]])
    ids = torch.zeros(4, 1, dtype=torch.int32)
    _, values = ops.indexed_dot_backward_table(torch.ones(4, 1), hidden, ids)
    assert values.tolist() == [[1.0]]
    _, values = ops.indexed_dot_backward_table(
        torch.tensor([[1e8, 1.0, -1e8, 1.0]]), torch.ones(1, 1), ids.view(1, 4)
    )
    assert values.tolist() == [[1.0]]


@needs_extension
@pytest.mark.parametrize("vocabulary", [2047, 2048, 300_000, 2**31 - 1])
def test_ids_of_every_size_are_sorted(vocabulary):
    ids = torch.randint(0, vocabulary, (500, 3), dtype=torch.int64)
    ids[0] = torch.tensor([vocabulary - 1, 0, vocabulary - 1])
    hidden, grad = torch.randn(500, 8, dtype=torch.double), torch.randn(500, 3).double()
    rows, values = ops.indexed_dot_backward_table(grad, hidden.float(), ids)
    true_rows, true_values = reference.indexed_dot_backward_table(grad, hidden, ids)
    assert torch.equal(rows, true_rows)
    torch.testing.assert_close(values.double(), true_values, rtol=1e-5, atol=1e-5)


def test_reference_is_the_dot_product_in_fp64(monkeypatch):
    hidden, table, ids, grad = problem(30, 5, 20, 17, torch.float64)
    true_dots, true_hidden, true_table = exact(hidden, table, ids, grad)
    for chunk in (1 << 24, 1):
        monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", chunk)
        torch.testing.assert_close(ops.indexed_dot(hidden, table, ids), true_dots)
        d_hidden = ops.indexed_dot_backward_hidden(grad, table, ids, torch.float64)
        torch.testing.assert_close(d_hidden, true_hidden)
        dense = ops.indexed_dot_backward_dense(grad, hidden, ids, 20, torch.float64)
        torch.testing.assert_close(dense, true_table)


def test_without_rows_slots_or_used_ids():
    for shape in ((0, 5), (4, 0), (4, 5)):
        hidden, table = torch.randn(shape[0], 6), torch.randn(9, 6)
        ids, grad = torch.full(shape, -1), torch.full(shape, torch.nan)
        assert torch.equal(ops.indexed_dot(hidden, table, ids), torch.zeros(shape))
        d_hidden = ops.indexed_dot_backward_hidden(grad, table, ids, torch.float32)
        assert torch.equal(d_hidden, torch.zeros(shape[0], 6))
        assert [len(x) for x in ops.indexed_dot_backward_table(grad, hidden, ids)] == [0, 0]
        assert not ops.indexed_dot_backward_dense(grad, hidden, ids, 9, torch.float32).any()


@needs_extension
def test_results_do_not_depend_on_the_threads():
    before, results = torch.get_num_threads(), []
    hidden, table, ids, grad = problem(1000, 5, 300, 576, torch.bfloat16)
    ids[::2, 0] = 3  # one segment far longer than the others
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            dots = ops.indexed_dot(hidden, table, ids)
            d_hidden = ops.indexed_dot_backward_hidden(grad, table, ids, table.dtype)
            _, values = ops.indexed_dot_backward_table(grad, hidden, ids)
            results.append((dots, d_hidden, values))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    # Nor a row on the other rows.
    assert torch.equal(ops.indexed_dot(hidden[7:8], table, ids[7:8]), results[0][0][7:8])


def test_ops_pass_opcheck():
    for dtype in (torch.float32, torch.float64):
        hidden, table, ids, grad = problem(6, 4, 9, 10, dtype)
        leaves = [hidden.clone().requires_grad_(), table.clone().requires_grad_()]
        grad = grad.to(dtype)
        library = torch.ops.softgrpo_kernels
        torch.library.opcheck(library.indexed_dot.default, (*leaves, ids))
        torch.library.opcheck(
            library.indexed_dot_backward_hidden.default, (grad, table, ids, dtype)
        )
        torch.library.opcheck(
            library.indexed_dot_backward_dense.default, (grad, hidden, ids, 9, dtype)
        )
