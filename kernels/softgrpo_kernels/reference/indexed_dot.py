"""Dot products with selected rows of a table, and their gradients, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from softgrpo_kernels.tensors import wide_dtype

# Elements of the largest temporary (fp32: 64 MiB).
_CHUNK_ELEMENTS = 1 << 24


def indexed_dot(hidden: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """[N, K] of <hidden_i, table[ids_ij]>, 0 where ids < 0; fp32 (fp64 for fp64) throughout.

    hidden [N, H] and table [V, H] of one dtype; ids int [N, K].
    """
    wide = wide_dtype(hidden.dtype)
    out = torch.zeros(ids.shape, dtype=wide, device=ids.device)
    for rows in _row_chunks(ids.shape[0], ids.shape[1] * hidden.shape[1]):
        weight_NKH = table[ids[rows].long().clamp(min=0)].to(wide)
        out[rows] = torch.bmm(weight_NKH, hidden[rows].to(wide)[..., None])[..., 0]
    return out.masked_fill_(ids < 0, 0.0)


def indexed_dot_backward_hidden(
    grad: Tensor, table: Tensor, ids: Tensor, dtype: torch.dtype
) -> Tensor:
    """[N, H] of sum_j grad_ij table[ids_ij] in `dtype`; grad [N, K], unused slots ids < 0."""
    wide = wide_dtype(table.dtype)
    out = torch.empty(ids.shape[0], table.shape[1], dtype=dtype, device=table.device)
    grad = torch.where(ids >= 0, grad, 0.0).to(wide)
    for rows in _row_chunks(ids.shape[0], ids.shape[1] * table.shape[1]):
        weight_NKH = table[ids[rows].long().clamp(min=0)].to(wide)
        out[rows] = torch.bmm(grad[rows, None], weight_NKH)[:, 0].to(dtype)
    return out


def indexed_dot_backward_table(grad: Tensor, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of the table's gradient that are not zero.

    Returns:
        rows: int64 [U], ascending, every id that is used.
        values: [U, H] fp32 (fp64 for fp64), sum of grad_ij hidden_i in order of i, then j.
    """
    wide = wide_dtype(hidden.dtype)
    flat = ids.flatten().long()
    position = (flat >= 0).nonzero()[:, 0]
    rows, segment = flat[position].unique(return_inverse=True)
    values = torch.zeros(len(rows), hidden.shape[1], dtype=wide, device=hidden.device)
    for part in _row_chunks(len(position), hidden.shape[1]):
        at = position[part]
        terms = hidden[at // max(1, ids.shape[1])].to(wide) * grad.flatten()[at, None].to(wide)
        _add_rows(values, segment[part], terms)
    return rows, values


def _row_chunks(rows: int, elements_per_row: int) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // max(1, elements_per_row))
    return (slice(begin, begin + step) for begin in range(0, rows, step))


def _add_rows(table: Tensor, index: Tensor, rows: Tensor) -> None:
    """table[index] += rows in the order of the index."""
    if table.is_cpu:
        table.index_add_(0, index, rows)
    else:
        # Sorts the index first; index_add_ would add by atomics, in any order.
        table.index_put_((index,), rows, accumulate=True)
