"""Mixtures of the rows of a table, for a kernel that has their weights, and those of a record."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softgrpo_kernels.gpu.rounding import rounded
from softgrpo_kernels.gpu.soft_token.draw import mixture_weights
from softgrpo_kernels.gpu.soft_token.row import REACH, TAU
from softgrpo_kernels.record_tables import RecordTables
from softgrpo_kernels.tensors import unit_stride

BLOCK_H = 512


@triton.jit
def mixture_of(token, weight, slot, n, table, table_stride, h, width):
    """sum_j weight_j table[token_j, h] of the first n slots in their order, fp32. Compiled without
    fused multiply-add: the reference's bits."""
    sum_H = tl.zeros([h.shape[0]], tl.float32)
    for j in range(n):
        # (One term each.)
        weight_j = tl.sum(tl.where(slot == j, weight, 0.0), axis=0)
        token_j = tl.sum(tl.where(slot == j, token, 0), axis=0)
        used = (token_j >= 0) & (weight_j != 0.0)
        row = table + token_j.to(tl.int64) * table_stride
        row_H = tl.load(row + h, mask=h < tl.where(used, width, 0), other=0.0)
        sum_H = tl.where(used, sum_H + row_H.to(tl.float32) * weight_j, sum_H)
    return sum_H


@triton.jit(do_not_specialize=["columns", "before", "capacity", "k_max"])
def record_mixture_kernel(
    out, ids, gprime, kind, floats, columns, at_row, at_step, before, capacity, k_max, table,
    table_stride, width,
    K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Program (b, i): block i of the mixture that stands for position at_step - before of row
    at_row."""
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(at_row + index)
    place = row * capacity + tl.load(at_step + index) - before
    slot = tl.arange(0, K)
    inside = slot < k_max
    token = tl.load(ids + place * k_max + slot, mask=inside, other=-1)
    value = tl.load(gprime + place * k_max + slot, mask=inside, other=-float("inf"))
    soft = tl.load(kind + place) != 0
    weight = tl.where(slot == 0, 1.0, 0.0)
    if soft:
        column = columns // 2 + row  # as it draws softly
        tau = tl.load(floats + columns * TAU + column)
        reach = tl.load(floats + columns * REACH + column)
        weight = mixture_weights(value, token, tau, reach)
    # Nothing was drawn where the first g' is -inf.
    drawn = tl.max(tl.where(slot == 0, value, -float("inf")), axis=0) > -float("inf")
    n = tl.where(drawn, tl.max(tl.where(weight != 0.0, slot + 1, 0), axis=0), 0)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mixed = mixture_of(token, weight, slot, n, table, table_stride, h, width)
    tl.store(out + index * width + h, rounded(mixed, out.dtype.element_ty), mask=h < width)


def record_mixtures(
    record: RecordTables, row_T: Tensor, step_T: Tensor, embed: Tensor, before: int
) -> Tensor:
    """See `softgrpo_kernels.record_step.record_mixtures`."""
    table, width = unit_stride(embed), embed.shape[1]
    out = torch.empty((len(row_T), width), dtype=embed.dtype, device=embed.device)
    if not out.numel():
        return out
    ids, gprime, kind, *_ = record.drawn
    _, capacity, k_max = ids.shape
    floats = record.draws.floats
    record_mixture_kernel[(len(row_T), triton.cdiv(width, BLOCK_H))](
        out, ids, gprime, kind, floats, floats.shape[1], row_T, step_T,
        before, capacity, k_max, table, table.stride(0), width,
        K=triton.next_power_of_2(max(k_max, 2)), BLOCK_H=BLOCK_H, enable_fp_fusion=False,
    )  # fmt: skip
    return out
