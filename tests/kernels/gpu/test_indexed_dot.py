"""The Triton kernels of the training ops, against plain PyTorch in fp64."""

import pytest
import torch

from softgrpo_kernels.gpu import indexed_dot as gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def strided(*shape, dtype, device):
    """Rows further apart than they are long."""
    return torch.randn(shape[0], shape[1] + 3, device=device).to(dtype)[:, 3:]


def problem(rows, slots, vocabulary, width, dtype, device):
    hidden = strided(rows, width, dtype=dtype, device=device)
    table = strided(vocabulary, width, dtype=dtype, device=device)
    ids = torch.randint(-2, vocabulary, (rows, slots), device=device).clamp(min=-1).int()
    return hidden, table, ids, torch.randn(rows, slots, device=device)


# The last: a width of more than one block.
@pytest.mark.parametrize(("slots", "width"), [(1, 16), (5, 70), (9, 300)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dot_products_and_their_gradient_in_hidden(device, dtype, slots, width):
    hidden, table, ids, grad = problem(4, slots, 30, width, dtype, device)
    used = (ids >= 0)[..., None]
    rows = torch.where(used, table[ids.clamp(min=0).long()].double(), 0.0)
    out = gpu.indexed_dot(hidden, table, ids)
    assert out.dtype == torch.float32
    exact = (rows * hidden.double()[:, None]).sum(-1)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=2e-5)
    assert not out[ids < 0].any()
    d_hidden = gpu.indexed_dot_backward_hidden(grad, table, ids, torch.float32)
    exact = (rows * grad.double()[..., None]).sum(1)
    torch.testing.assert_close(d_hidden.double(), exact, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("piece", [4, 128])
@pytest.mark.parametrize("spread", ["all", "few", "one", "none"])
def test_sums_over_rows_of_the_table(device, monkeypatch, spread, piece):
    """Tokens that begin, end and go on in every way relative to the pieces."""
    monkeypatch.setattr(gpu, "PIECE", piece)
    hidden, _, ids, grad = problem(9, 3, 40, 20, torch.float32, device)
    if spread == "few":
        ids = (ids % 3).int()
    elif spread == "one":
        ids = torch.full_like(ids, 7)
    elif spread == "none":
        ids = torch.full_like(ids, -1)
    start = torch.randn(40, 20, device=device)
    out = start.clone()
    gpu.indexed_dot_add_to_table(out, grad, hidden, ids)
    exact = start.double()
    used = ids >= 0
    terms = (grad.double()[..., None] * hidden.double()[:, None])[used]
    exact.index_add_(0, ids[used].long(), terms)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    untouched = torch.ones(40, dtype=torch.bool, device=device)
    untouched[ids[used].long()] = False
    assert torch.equal(out[untouched], start[untouched])
    again = start.clone()
    gpu.indexed_dot_add_to_table(again, grad, hidden, ids)
    assert torch.equal(out, again)


def test_a_low_precision_gradient_is_rounded_once(device):
    hidden, _, _, grad = problem(40, 2, 5, 16, torch.float32, device)
    ids = torch.zeros(40, 2, dtype=torch.int32, device=device)
    start = torch.randn(5, 16, device=device).bfloat16()
    out = start.clone()
    gpu.indexed_dot_add_to_table(out, grad, hidden, ids)
    sums = torch.zeros(5, 16, device=device)
    gpu.indexed_dot_add_to_table(sums, grad, hidden, ids)
    assert torch.equal(out, (start.float() + sums).bfloat16())


def test_no_rows(device):
    hidden, table, ids, grad = problem(0, 3, 5, 8, torch.float32, device)
    assert gpu.indexed_dot(hidden, table, ids).shape == (0, 3)
    gpu.indexed_dot_add_to_table(table, grad, hidden, ids)
