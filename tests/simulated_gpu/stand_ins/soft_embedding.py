"""Stand-in for the kernel of `softgrpo_kernels.gpu.soft_embedding`."""

from __future__ import annotations

import torch
from torch import Tensor

from .memory import rows_of, table_of

Grid = tuple[int, ...]


def soft_embedding_kernel(
    grid: Grid,
    out: Tensor,
    ids: Tensor,
    weights: Tensor,
    table: Tensor,
    table_stride: int,
    slots: int,
    width: int,
    BLOCK_H: int,
) -> None:
    rows = grid[0]
    assert (grid[1] - 1) * BLOCK_H < width <= grid[1] * BLOCK_H
    mixed = mixtures(
        rows_of(ids, rows, slots, slots), rows_of(weights, rows, slots, slots), table,
        table_stride, width,
    )  # fmt: skip
    rows_of(out, rows, width, width).copy_(mixed)


def mixtures(
    ids_NK: Tensor, weights_NK: Tensor, table: Tensor, table_stride: int, width: int
) -> Tensor:
    """fp32 [N, width]: sums in the order of the slots."""
    used = (ids_NK >= 0) & (weights_NK != 0.0)
    picked = torch.where(used, ids_NK, 0).long().flatten()
    rows_NKH = table_of(table, table_stride, width).index_select(0, picked)
    terms = rows_NKH.float().view(*ids_NK.shape, width) * weights_NK[..., None]
    # Where a slot is not used its row may hold anything.
    terms = torch.where(used[..., None], terms, 0.0)
    total = torch.zeros(len(ids_NK), width)
    for slot in range(ids_NK.shape[1]):  # in the order of the kernel: the same bits
        total += terms[:, slot]
    return total
