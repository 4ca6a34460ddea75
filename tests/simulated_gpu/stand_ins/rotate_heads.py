"""Stand-ins for the kernels of `softgrpo_engine.ops.gpu.rotate_heads`."""

from __future__ import annotations

import torch
from torch import Tensor

from .memory import first, rows_of

Grid = tuple[int, ...]


def rotate_heads_kernel(
    grid: Grid,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    copy_starts: Tensor,
    copies: Tensor,
    num_heads: int,
    num_kv_heads: int,
    DIM: int,
    BLOCK_HEADS: int,
    BLOCK_D: int,
) -> None:
    rows, half, heads = grid[0], DIM // 2, num_heads + 2 * num_kv_heads
    assert (grid[1] - 1) * BLOCK_HEADS < heads <= grid[1] * BLOCK_HEADS
    assert half <= BLOCK_D
    heads_TND = _heads(qkv, rows, heads, DIM)
    turning, v_TKD = heads_TND.split([num_heads + num_kv_heads, num_kv_heads], dim=1)
    cos_TD, sin_TD = (rows_of(x, rows, DIM, DIM).to(qkv.dtype)[:, None] for x in (cos, sin))
    # In the dtype of qkv: each product and the sum is rounded.
    swapped = torch.cat((-turning[..., half:], turning[..., :half]), dim=-1)
    q_TQD, k_TKD = (turning * cos_TD + swapped * sin_TD).split([num_heads, num_kv_heads], dim=1)
    _heads(q, rows, num_heads, DIM).copy_(q_TQD)
    row, place = _copies(copy_starts, copies, rows)
    for target, source_TKD in ((k, k_TKD), (v, v_TKD)):
        _heads(target, len(place), num_kv_heads, DIM)[place] = source_TKD[row]


def rotate_heads_backward_kernel(
    grid: Grid,
    d_qkv: Tensor,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    copy_starts: Tensor,
    copies: Tensor,
    num_heads: int,
    num_kv_heads: int,
    DIM: int,
    BLOCK_HEADS: int,
    BLOCK_D: int,
) -> None:
    rows, half, heads = grid[0], DIM // 2, num_heads + 2 * num_kv_heads
    assert (grid[1] - 1) * BLOCK_HEADS < heads <= grid[1] * BLOCK_HEADS
    assert half <= BLOCK_D
    row, place = _copies(copy_starts, copies, rows)
    sums = [
        torch.zeros(rows, num_kv_heads, DIM).index_add_(
            0, row, _heads(x, len(place), num_kv_heads, DIM)[place].float()
        )
        for x in (d_k, d_v)
    ]
    turned = torch.cat([_heads(d_q, rows, num_heads, DIM).float(), sums[0]], dim=1)
    cos_TD, sin_TD = (
        rows_of(x, rows, DIM, DIM).to(d_qkv.dtype).float()[:, None] for x in (cos, sin)
    )
    across = turned * sin_TD
    swapped = torch.cat((across[..., half:], -across[..., :half]), dim=-1)
    back = torch.cat([turned * cos_TD + swapped, sums[1]], dim=1)
    _heads(d_qkv, rows, heads, DIM).copy_(back)


def _heads(x: Tensor, rows: int, heads: int, dim: int) -> Tensor:
    return rows_of(x, rows, heads * dim, heads * dim).view(rows, heads, dim)


def _copies(copy_starts: Tensor, copies: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """(row, place) of every copy."""
    starts = first(copy_starts, rows + 1).long()
    row = torch.arange(rows).repeat_interleave(starts.diff())
    return row, first(copies, len(row)).long()
