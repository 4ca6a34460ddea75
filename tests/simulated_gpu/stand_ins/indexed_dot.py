"""Stand-ins for the kernels of `softgrpo_kernels.gpu.indexed_dot`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .memory import first, rows_of, table_of

Grid = tuple[int, ...]


def indexed_dot_kernel(
    grid: Grid,
    out: Tensor,
    hidden: Tensor,
    table: Tensor,
    ids: Tensor,
    hidden_stride: int,
    table_stride: int,
    slots: int,
    width: int,
    BLOCK_K: int,
    BLOCK_H: int,
) -> None:
    rows = grid[0]
    assert (grid[1] - 1) * BLOCK_K < slots <= grid[1] * BLOCK_K
    ids_NK = rows_of(ids, rows, slots, slots).long()
    x_NH = rows_of(hidden, rows, hidden_stride, width).float()
    w_MH = table_of(table, table_stride, width).index_select(0, ids_NK.clamp(min=0).flatten())
    dots = torch.bmm(w_MH.float().view(rows, slots, width), x_NH[..., None])[..., 0]
    rows_of(out, rows, slots, slots).copy_(torch.where(ids_NK >= 0, dots, 0.0))


def piece_sums_kernel(
    grid: Grid,
    table_grad: Tensor,
    heads: Tensor,
    tails: Tensor,
    tokens: Tensor,
    pairs: Tensor,
    grad: Tensor,
    hidden: Tensor,
    table_stride: int,
    hidden_stride: int,
    count: int,
    slots: int,
    width: int,
    UNUSED: int,
    PIECE: int,
    BLOCK_H: int,
) -> None:
    pieces = grid[0]
    assert (pieces - 1) * PIECE < count <= pieces * PIECE
    assert (grid[1] - 1) * BLOCK_H < width <= grid[1] * BLOCK_H
    token, pair, place = first(tokens, count), first(pairs, count), torch.arange(count)
    new = F.pad(token[1:] != token[:-1], (1, 0), value=True)
    # A segment: pairs of one token within one piece.
    begin = (new | (place % PIECE == 0)).nonzero()[:, 0]
    end = F.pad(begin[1:], (0, 1), value=count)
    began_earlier, ends = ~new[begin], F.pad(new, (0, 1), value=True)[end]
    used = token[begin] != UNUSED

    real = token != UNUSED
    # Of an unused pair the kernel reads the gradient alone.
    row = torch.where(real, pair // slots, 0)
    x_PH = rows_of(hidden, int(row.max()) + 1, hidden_stride, width)[row].float()
    grad_P = first(grad, int(pair.max()) + 1)[pair]
    terms = torch.where(real[:, None], grad_P[:, None] * x_PH, 0.0)
    segment = torch.repeat_interleave(torch.arange(len(begin)), end - begin)
    sums = torch.zeros(len(begin), width).index_add_(0, segment, terms)

    for target, chosen in ((heads, began_earlier), (tails, ~began_earlier & ~ends)):
        at = used & chosen
        rows_of(target, pieces, width, width)[begin[at] // PIECE] = sums[at]
    at = used & ~began_earlier & ends
    _add_rows(table_of(table_grad, table_stride, width), token[begin[at]].long(), sums[at])


def join_pieces_kernel(
    grid: Grid,
    table_grad: Tensor,
    heads: Tensor,
    tails: Tensor,
    tokens: Tensor,
    ends: Tensor,
    table_stride: int,
    count: int,
    width: int,
    UNUSED: int,
    PIECE: int,
    BLOCK_H: int,
) -> None:
    pieces = grid[0]
    assert (grid[1] - 1) * BLOCK_H < width <= grid[1] * BLOCK_H
    memory, end = first(tokens, count), first(ends, pieces)
    piece = torch.arange(pieces)
    after = (piece + 1) * PIECE
    token = torch.where(after <= count, memory[after.clamp(max=count) - 1], UNUSED)
    before = torch.where(piece > 0, memory[(piece * PIECE - 1).clamp(min=0)], -1)
    begins = ((end > after) & (before != token) & (token != UNUSED)).nonzero()[:, 0]
    if not len(begins):
        return
    # Row j of the sums takes the heads of the pieces after begins[j] up to where its token ends.
    later = (end[begins] - 1) // PIECE - begins
    owner = torch.repeat_interleave(torch.arange(len(begins)), later)
    step = torch.arange(len(owner)) - (later.cumsum(0) - later)[owner]
    heads_PH = rows_of(heads, pieces, width, width)[begins[owner] + 1 + step]
    sums = rows_of(tails, pieces, width, width)[begins].index_add_(0, owner, heads_PH)
    _add_rows(table_of(table_grad, table_stride, width), token[begins].long(), sums)


def _add_rows(table: Tensor, row: Tensor, sums: Tensor) -> None:
    """Rows that differ: one rounding of (old + sum)."""
    table[row] = (table[row].float() + sums).to(table.dtype)
