"""RoPE and the KV store in Triton.

Meaning: `softgrpo_engine.ops.reference`, whose roundings it has. The launch follows from
shapes, so that nothing waits for the device and a CUDA graph can hold it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from softgrpo_kernels.gpu.rounding import rounded

# Heads that one program rotates or copies.
BLOCK_HEADS = 8


@triton.jit
def _rotated(x, other, cos, sin, SIGN: tl.constexpr, dtype: tl.constexpr):
    """x cos + SIGN other sin; the two products and the sum each rounded."""
    turned = rounded(SIGN * other * sin, dtype).to(tl.float32)
    return rounded(rounded(x * cos, dtype).to(tl.float32) + turned, dtype)


@triton.jit
def rope_of(cos, sin, row, d, DIM: tl.constexpr, dtype: tl.constexpr):
    """Cosines of the lower and the upper half of a token's heads, and sines, each [1, D / 2]:
    rounded to the dtype of the computation, as fp32."""
    HALF: tl.constexpr = DIM // 2
    at, inside = row * DIM + d, d < HALF
    cos_low = rounded(tl.load(cos + at, mask=inside, other=0.0), dtype).to(tl.float32)
    cos_high = rounded(tl.load(cos + at + HALF, mask=inside, other=0.0), dtype).to(tl.float32)
    sin_low = rounded(tl.load(sin + at, mask=inside, other=0.0), dtype).to(tl.float32)
    sin_high = rounded(tl.load(sin + at + HALF, mask=inside, other=0.0), dtype).to(tl.float32)
    return cos_low[None, :], cos_high[None, :], sin_low[None, :], sin_high[None, :]


@triton.jit
def rotated_heads(qkv, cos, sin, row, head, heads, d, inside, DIM: tl.constexpr):
    """Halves of some heads of a token as they are, and rotated: (low, high, new low, new high)."""
    dtype = qkv.dtype.element_ty
    source = qkv + (row * heads + head)[:, None] * DIM + d[None, :]
    low = tl.load(source, mask=inside, other=0.0)
    high = tl.load(source + DIM // 2, mask=inside, other=0.0)
    cos_low, cos_high, sin_low, sin_high = rope_of(cos, sin, row, d, DIM, dtype)
    x, y = low.to(tl.float32), high.to(tl.float32)
    new_low = _rotated(x, y, cos_low, sin_low, -1.0, dtype)
    new_high = _rotated(y, x, cos_high, sin_high, 1.0, dtype)
    return low, high, new_low, new_high


@triton.jit(do_not_specialize=["num_heads", "num_kv_heads"])
def rope_store_kv_kernel(
    q_out, k_pages, v_pages, qkv, cos, sin, slot_mapping, num_heads, num_kv_heads,
    PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (t, g): the g-th block of the heads of token t, those of q, then of k, then of v."""
    HALF: tl.constexpr = DIM // 2
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    heads = num_heads + 2 * num_kv_heads
    d = tl.arange(0, BLOCK_D)
    inside = (head < heads)[:, None] & (d < HALF)[None, :]
    low, high, new_low, new_high = rotated_heads(qkv, cos, sin, row, head, heads, d, inside, DIM)

    is_q = inside & (head < num_heads)[:, None]
    target = q_out + (row * num_heads + head)[:, None] * DIM + d[None, :]
    tl.store(target, new_low, mask=is_q)
    tl.store(target + HALF, new_high, mask=is_q)

    slot = tl.load(slot_mapping + row)
    page, offset = slot // PAGE, slot % PAGE
    kv_head = head - num_heads
    place = ((page * num_kv_heads + kv_head) * PAGE + offset)[:, None] * DIM + d[None, :]
    is_k = inside & ((kv_head >= 0) & (kv_head < num_kv_heads))[:, None]
    tl.store(k_pages + place, new_low, mask=is_k)
    tl.store(k_pages + place + HALF, new_high, mask=is_k)
    place -= tl.cast(num_kv_heads, tl.int64) * PAGE * DIM
    is_v = inside & (kv_head >= num_kv_heads)[:, None]
    tl.store(v_pages + place, low, mask=is_v)
    tl.store(v_pages + place + HALF, high, mask=is_v)


def rope_store_kv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> Tensor:
    """See `softgrpo_engine.ops.rope_store_kv`. A slot outside the pages is not noticed."""
    rows, (page, dim) = qkv.shape[0], k_pages.shape[2:]
    q_TQD = qkv.new_empty(rows, num_heads, dim)
    if rows:
        grid = (rows, triton.cdiv(num_heads + 2 * num_kv_heads, BLOCK_HEADS))
        rope_store_kv_kernel[grid](
            q_TQD, k_pages, v_pages, qkv.contiguous(), cos.contiguous(), sin.contiguous(),
            slot_mapping.contiguous(), num_heads, num_kv_heads,
            PAGE=page, DIM=dim, BLOCK_HEADS=BLOCK_HEADS, BLOCK_D=triton.next_power_of_2(dim // 2),
            num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return q_TQD
