"""Mixtures of rows of a table in Triton; meaning: `softgrpo_kernels.reference.soft_embedding`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softgrpo_kernels.gpu.rounding import rounded
from softgrpo_kernels.tensors import int32, unit_stride

BLOCK_H = 512


@triton.jit(do_not_specialize=["slots"])
def soft_embedding_kernel(
    out, ids, weights, table, table_stride, slots, width, BLOCK_H: tl.constexpr
):  # fmt: skip
    """Program (i, b): block b of mixture i. Compiled without fused multiply-add: the reference's
    bits."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    sum_H = tl.zeros([BLOCK_H], tl.float32)
    for slot in range(slots):
        token = tl.load(ids + row * slots + slot)
        weight = tl.load(weights + row * slots + slot)
        used = (token >= 0) & (weight != 0.0)
        row_H = tl.load(
            table + token.to(tl.int64) * table_stride + h,
            mask=h < tl.where(used, width, 0),
            other=0.0,
        )
        sum_H = tl.where(used, sum_H + row_H.to(tl.float32) * weight, sum_H)
    tl.store(out + row * width + h, rounded(sum_H, out.dtype.element_ty), mask=h < width)


def soft_embedding(
    ids: Tensor, weights: Tensor, embed: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """sum_j weights[.., j] embed[ids[.., j]]: [..., H] in `dtype`, embed's by default."""
    out = embed.new_empty((*ids.shape[:-1], embed.shape[1]), dtype=dtype or embed.dtype)
    mix_into(out, ids, weights, embed)
    return out


def mix_into(out: Tensor, ids: Tensor, weights: Tensor, embed: Tensor) -> None:
    """`soft_embedding` into a contiguous tensor [..., H]."""
    if not out.numel():
        return
    table = unit_stride(embed)
    ids, weights = int32(ids), weights.float().contiguous()
    slots, width = ids.shape[-1], table.shape[1]
    grid = (out.numel() // width, triton.cdiv(width, BLOCK_H))
    soft_embedding_kernel[grid](
        out, ids, weights, table, table.stride(0), slots, width, BLOCK_H=BLOCK_H,
        enable_fp_fusion=False,
    )  # fmt: skip
