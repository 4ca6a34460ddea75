"""Norm, activation and RoPE in Triton: the reference's bits, up to the order of a sum and exp."""

import pytest
import torch

from softgrpo_engine.ops import gpu, reference

DTYPES = [torch.bfloat16, torch.float32]


def assert_close(out, expected):
    """Of a bf16 result at most a few values lie on the other side of a rounding."""
    if out.dtype == torch.bfloat16:
        torch.testing.assert_close(out, expected, rtol=2**-7, atol=1e-6)
        assert (out != expected).float().mean() <= 5e-3
    else:
        torch.testing.assert_close(out, expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(4, 576), (3, 100), (2, 7)])
def test_rms_norm(device, rows, width, dtype):
    x, residual = torch.randn(2, rows, width, device=device).to(dtype)
    weight = (1 + 0.3 * torch.randn(width, device=device)).to(dtype)
    kept = residual.clone()
    assert_close(gpu.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    out, total = gpu.rms_norm(x, weight, 1e-5, residual)
    expected, expected_total = reference.rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(total, expected_total)
    assert_close(out, expected)
    assert torch.equal(residual, kept)
    assert torch.equal(gpu.rms_norm(x[1:2], weight, 1e-5, residual[1:2])[0], out[1:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:overflow")  # NumPy's, under the interpreter
@pytest.mark.parametrize(("rows", "width"), [(3, 1536), (2, 50), (1, 1)])
def test_silu_mul(device, rows, width, dtype):
    gate_up = (4 * torch.randn(rows, 2 * width, device=device)).to(dtype)
    gate_up[0, 0] = -120.0  # exp overflows
    assert_close(gpu.silu_mul(gate_up), reference.silu_mul(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "dim", "page"),
    [(9, 3, 64, 16), (14, 2, 128, 16), (2, 1, 20, 3)],
)
def test_rope_store_kv_has_the_bits_of_the_reference(
    device, num_heads, num_kv_heads, dim, page, dtype
):
    rows = 7
    qkv = torch.randn(rows, (num_heads + 2 * num_kv_heads) * dim, device=device).to(dtype)
    # Halves that differ, as no RoPE has them: each must meet its own.
    cos, sin = torch.randn(2, rows, dim, device=device)
    slots = torch.randperm(4 * page, device=device)[:rows]
    ours, expected = (
        [torch.full((4, num_kv_heads, page, dim), 5.0, dtype=dtype, device=device) for _ in "kv"]
        for _ in range(2)
    )
    q = gpu.rope_store_kv(qkv, cos, sin, *ours, slots, num_heads, num_kv_heads)
    arguments = (cos, sin, *expected, slots, num_heads, num_kv_heads)
    assert torch.equal(q, reference.rope_store_kv(qkv, *arguments))
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])


def test_no_rows(device):
    x = torch.empty(0, 8, device=device)
    pages = torch.zeros(2, 1, 4, 2, device=device)
    assert gpu.rms_norm(x, torch.ones(8, device=device), 1e-5).shape == (0, 8)
    assert gpu.silu_mul(x).shape == (0, 4)
    slots = torch.empty(0, dtype=torch.int64, device=device)
    q = gpu.rope_store_kv(x, x[:, :2], x[:, :2], pages, pages, slots, 2, 1)
    assert q.shape == (0, 2, 2)
