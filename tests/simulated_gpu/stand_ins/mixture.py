"""Stand-in for the kernel of `softgrpo_kernels.gpu.soft_token.mixture`."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_kernels.row_rules import FLOAT_COLUMNS
from softgrpo_kernels.soft_weights import weights_within

from .memory import first, flat, rows_of
from .soft_embedding import mixtures

Grid = tuple[int, ...]


def record_mixture_kernel(
    grid: Grid,
    out: Tensor,
    ids: Tensor,
    gprime: Tensor,
    kind: Tensor,
    floats: Tensor,
    columns: int,
    at_row: Tensor,
    at_step: Tensor,
    before: int,
    capacity: int,
    k_max: int,
    table: Tensor,
    table_stride: int,
    width: int,
    K: int,
    BLOCK_H: int,
) -> None:
    batch = grid[0]
    assert (grid[1] - 1) * BLOCK_H < width <= grid[1] * BLOCK_H
    assert k_max <= K
    row = first(at_row, batch)
    place = row * capacity + first(at_step, batch) - before
    slots = place[:, None] * k_max + torch.arange(k_max)
    draws = rows_of(floats, len(FLOAT_COLUMNS), columns, columns)[:, columns // 2 + row]
    tau, reach = (draws[FLOAT_COLUMNS.index(name)] for name in ("tau", "reach"))
    weights = weights_within(flat(gprime)[slots], flat(kind)[place], tau, reach)
    mixed = mixtures(flat(ids)[slots], weights, table, table_stride, width)
    rows_of(out, batch, width, width).copy_(mixed)
