"""RoPE and the KV store in Triton."""

import pytest
import torch

from softgrpo_engine.ops import gpu, reference

DTYPES = [torch.bfloat16, torch.float32]


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
    slots = torch.empty(0, dtype=torch.int64, device=device)
    q = gpu.rope_store_kv(x, x[:, :2], x[:, :2], pages, pages, slots, 2, 1)
    assert q.shape == (0, 2, 2)
