"""Dot products with selected rows of a table, and their gradients, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_kernels.cpu import kernels
from softgrpo_kernels.cpu.soft_embedding import soft_embedding
from softgrpo_kernels.tensors import DTYPES, int32, unit_stride


def indexed_dot(hidden: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """See `softgrpo_kernels.indexed_dot`, as for all."""
    hidden, table, ids = unit_stride(hidden), unit_stride(table), int32(ids)
    out = torch.empty(ids.shape, dtype=torch.float32)
    kernels().indexed_dot(
        out.data_ptr(),
        hidden.data_ptr(),
        hidden.stride(0),
        ids.data_ptr(),
        *ids.shape,
        table.data_ptr(),
        table.stride(0),
        table.shape[1],
        DTYPES[table.dtype],
    )
    return out


def indexed_dot_backward_hidden(grad: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """In the table's dtype: the mixture of rows with grad for weights."""
    return soft_embedding(ids, grad, table)


def indexed_dot_backward_table(grad: Tensor, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(ids in use, the sums of their rows)."""
    keys, distinct = _sorted_pairs(ids)
    rows = torch.empty(distinct, dtype=torch.int64)
    values = torch.empty(distinct, hidden.shape[1])
    _segment_sums(values, rows, keys, grad, hidden, ids)
    return rows, values


def indexed_dot_add_to_table(table_grad: Tensor, grad: Tensor, hidden: Tensor, ids: Tensor) -> None:
    """Unit stride in the last axis of table_grad."""
    keys, _ = _sorted_pairs(ids)
    _segment_sums(table_grad, None, keys, grad, hidden, ids)


def _sorted_pairs(ids: Tensor) -> tuple[Tensor, int]:
    """(id << 32 | position) of the used slots, ascending, and the number of distinct ids."""
    ids = int32(ids)
    keys, spare = (torch.empty(ids.numel(), dtype=torch.int64) for _ in range(2))
    pairs = kernels().sort_ids(keys.data_ptr(), spare.data_ptr(), ids.data_ptr(), ids.numel())
    keys = keys[:pairs]
    token = keys >> 32
    return keys, int((token[1:] != token[:-1]).sum()) + min(1, pairs)


def _segment_sums(
    out: Tensor,
    row_ids: Tensor | None,
    keys: Tensor,
    grad: Tensor,
    hidden: Tensor,
    ids: Tensor,
) -> None:
    grad, hidden = grad.float().contiguous(), unit_stride(hidden)
    kernels().segment_sums(
        out.data_ptr(),
        0 if row_ids is None else row_ids.data_ptr(),
        out.stride(0),
        DTYPES[out.dtype],
        keys.data_ptr(),
        len(keys),
        grad.data_ptr(),
        hidden.data_ptr(),
        ids.shape[1],
        hidden.stride(0),
        hidden.shape[1],
        DTYPES[hidden.dtype],
    )
