"""RoPE, and the keys and values of packed groups where attention reads them, in Triton.

In training a prompt is computed once and every response of its group attends to it: packed flash
attention wants the prompt's keys and values before those of each response. The kernel writes all of
these copies, and the backward pass adds their gradients, in fp32 and always in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from softgrpo_engine.ops.gpu.rope_store_kv import BLOCK_HEADS, rope_of, rotated_heads
from softgrpo_kernels.gpu.rounding import rounded


@triton.jit(do_not_specialize=["num_heads", "num_kv_heads"])
def rotate_heads_kernel(
    q, k, v, qkv, cos, sin, copy_starts, copies, num_heads, num_kv_heads,
    DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (t, g): the g-th block of the heads of token t, those of q, then of k, then of v."""
    HALF: tl.constexpr = DIM // 2
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    heads, kv_head = num_heads + 2 * num_kv_heads, head - num_heads
    d = tl.arange(0, BLOCK_D)
    inside = (head < heads)[:, None] & (d < HALF)[None, :]
    low, high, new_low, new_high = rotated_heads(qkv, cos, sin, row, head, heads, d, inside, DIM)
    is_q = inside & (kv_head < 0)[:, None]
    target = q + (row * num_heads + head)[:, None] * DIM + d[None, :]
    tl.store(target, new_low, mask=is_q)
    tl.store(target + HALF, new_high, mask=is_q)
    if (tl.program_id(1) + 1) * BLOCK_HEADS > num_heads:
        is_k = inside & ((kv_head >= 0) & (kv_head < num_kv_heads))[:, None]
        is_v = inside & (kv_head >= num_kv_heads)[:, None]
        for copy in range(tl.load(copy_starts + row), tl.load(copy_starts + row + 1)):
            place = tl.load(copies + copy).to(tl.int64) * num_kv_heads + kv_head
            target = k + place[:, None] * DIM + d[None, :]
            tl.store(target, new_low, mask=is_k)
            tl.store(target + HALF, new_high, mask=is_k)
            target = v + (place - num_kv_heads)[:, None] * DIM + d[None, :]
            tl.store(target, low, mask=is_v)
            tl.store(target + HALF, high, mask=is_v)


@triton.jit(do_not_specialize=["num_heads", "num_kv_heads"])
def rotate_heads_backward_kernel(
    d_qkv, d_q, d_k, d_v, cos, sin, copy_starts, copies, num_heads, num_kv_heads,
    DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (t, g): the gradients of that block, turned back."""
    dtype = d_qkv.dtype.element_ty
    HALF: tl.constexpr = DIM // 2
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    heads, kv_head = num_heads + 2 * num_kv_heads, head - num_heads
    d = tl.arange(0, BLOCK_D)
    inside = (head < heads)[:, None] & (d < HALF)[None, :]
    is_q = inside & (kv_head < 0)[:, None]
    is_v = inside & (kv_head >= num_kv_heads)[:, None]
    source = d_q + (row * num_heads + head)[:, None] * DIM + d[None, :]
    low = tl.load(source, mask=is_q, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=is_q, other=0.0).to(tl.float32)
    if (tl.program_id(1) + 1) * BLOCK_HEADS > num_heads:
        is_k = inside & ((kv_head >= 0) & (kv_head < num_kv_heads))[:, None]
        for copy in range(tl.load(copy_starts + row), tl.load(copy_starts + row + 1)):
            place = tl.load(copies + copy).to(tl.int64) * num_kv_heads + kv_head
            source = d_k + place[:, None] * DIM + d[None, :]
            low += tl.load(source, mask=is_k, other=0.0).to(tl.float32)
            high += tl.load(source + HALF, mask=is_k, other=0.0).to(tl.float32)
            source = d_v + (place - num_kv_heads)[:, None] * DIM + d[None, :]
            low += tl.load(source, mask=is_v, other=0.0).to(tl.float32)
            high += tl.load(source + HALF, mask=is_v, other=0.0).to(tl.float32)
    cos_low, cos_high, sin_low, sin_high = rope_of(cos, sin, row, d, DIM, dtype)
    new_low = tl.where(is_v, low, low * cos_low + high * sin_high)
    new_high = tl.where(is_v, high, high * cos_high - low * sin_low)
    target = d_qkv + (row * heads + head)[:, None] * DIM + d[None, :]
    tl.store(target, rounded(new_low, dtype), mask=inside)
    tl.store(target + HALF, rounded(new_high, dtype), mask=inside)


def rotate_heads(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    copy_starts: Tensor,
    copies: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k rotated, k and v copied to where attention reads them.

    qkv: [T, (Hq + 2 Hkv) D]. cos, sin: fp32 [T, D], rounded to qkv's dtype as
    `softgrpo_engine.ops.rope_store_kv` does. copies: int32 [S], places in k and v, each once; those
    of token t are copies[copy_starts[t] : copy_starts[t + 1]], copy_starts int32 [T + 1].

    Returns q [T, Hq, D] and k, v [S, Hkv, D].
    """
    rows, dim = qkv.shape[0], qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    q = qkv.new_empty(rows, num_heads, dim)
    k, v = (qkv.new_empty(len(copies), num_kv_heads, dim) for _ in range(2))
    if rows:
        rotate_heads_kernel[_grid(rows, num_heads, num_kv_heads)](
            q, k, v, qkv.contiguous(), cos.contiguous(), sin.contiguous(), copy_starts, copies,
            num_heads, num_kv_heads, DIM=dim, BLOCK_HEADS=BLOCK_HEADS,
            BLOCK_D=triton.next_power_of_2(dim // 2), num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return q, k, v


def rotate_heads_backward(
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    copy_starts: Tensor,
    copies: Tensor,
) -> Tensor:
    """The gradient of qkv, [T, (Hq + 2 Hkv) D]."""
    (rows, num_heads, dim), num_kv_heads = d_q.shape, d_k.shape[1]
    d_qkv = d_q.new_empty(rows, (num_heads + 2 * num_kv_heads) * dim)
    if rows:
        rotate_heads_backward_kernel[_grid(rows, num_heads, num_kv_heads)](
            d_qkv, d_q.contiguous(), d_k.contiguous(), d_v.contiguous(), cos.contiguous(),
            sin.contiguous(), copy_starts, copies, num_heads, num_kv_heads, DIM=dim,
            BLOCK_HEADS=BLOCK_HEADS, BLOCK_D=triton.next_power_of_2(dim // 2), num_warps=1,
        )  # fmt: skip
    return d_qkv


def _grid(rows: int, num_heads: int, num_kv_heads: int) -> tuple[int, int]:
    return rows, triton.cdiv(num_heads + 2 * num_kv_heads, BLOCK_HEADS)
