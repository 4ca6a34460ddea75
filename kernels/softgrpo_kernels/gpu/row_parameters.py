"""The tables of `RowParameters` in one launch: numbers go with it, tensors are read by it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from softgrpo_kernels.row_rules import FLOAT_COLUMNS, RowValues

BLOCK = 256


@triton.jit
def _column(table, row, rows, value, COLUMN: tl.constexpr, TENSORS: tl.constexpr):
    """One column of a table: a number, or of every row its own."""
    inside = row < rows
    if (TENSORS >> COLUMN) & 1:
        x = tl.load(value + row, mask=inside, other=0)
    else:
        x = tl.zeros([row.shape[0]], table.dtype.element_ty) + value
    tl.store(table + row, x.to(table.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        "rows", "temperature", "top_p", "min_p", "tau", "reach", "noise_scale", "clamp_low",
        "clamp_high", "eps", "top_k", "seed", "position", "uid", "stream", "mode", "noise",
    ]
)  # fmt: skip
def fill_rows_kernel(
    floats, ints, rows, temperature, top_p, min_p, tau, reach, noise_scale, clamp_low, clamp_high,
    eps, top_k, seed, position, uid, stream, mode, noise,
    TENSORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i: BLOCK rows of both tables. Bit j of TENSORS: value j is a tensor."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _column(floats, row, rows, temperature, 0, TENSORS)
    _column(floats + rows, row, rows, top_p, 1, TENSORS)
    _column(floats + 2 * rows, row, rows, min_p, 2, TENSORS)
    _column(floats + 3 * rows, row, rows, tau, 3, TENSORS)
    _column(floats + 4 * rows, row, rows, reach, 4, TENSORS)
    _column(floats + 5 * rows, row, rows, noise_scale, 5, TENSORS)
    _column(floats + 6 * rows, row, rows, clamp_low, 6, TENSORS)
    _column(floats + 7 * rows, row, rows, clamp_high, 7, TENSORS)
    _column(floats + 8 * rows, row, rows, eps, 8, TENSORS)
    _column(ints, row, rows, top_k, 9, TENSORS)
    _column(ints + rows, row, rows, seed, 10, TENSORS)
    _column(ints + 2 * rows, row, rows, position, 11, TENSORS)
    _column(ints + 3 * rows, row, rows, uid, 12, TENSORS)
    _column(ints + 4 * rows, row, rows, stream, 13, TENSORS)
    _column(ints + 5 * rows, row, rows, mode, 14, TENSORS)
    _column(ints + 6 * rows, row, rows, noise, 15, TENSORS)


def fill_rows(floats: Tensor, ints: Tensor, values: RowValues) -> None:
    """Fills tables [9, B] and [7, B] with numbers and tensors, each of one number or [B]."""
    rows = floats.shape[1]
    if not rows:
        return
    given, tensors = [], 0
    for i, value in enumerate(values):
        if isinstance(value, Tensor):
            tensors |= 1 << i
            given.append(_of_every_row(value, floats.device, rows))
        else:
            given.append(float(value) if i < len(FLOAT_COLUMNS) else int(value))
    fill_rows_kernel[(triton.cdiv(rows, BLOCK),)](
        floats, ints, rows, *given, TENSORS=tensors, BLOCK=BLOCK
    )


def _of_every_row(value: Tensor, device: torch.device, rows: int) -> Any:
    return value.to(device).expand(rows).contiguous()
