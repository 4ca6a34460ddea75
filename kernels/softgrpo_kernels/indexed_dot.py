"""Dot products with selected rows of a table: all that the training ops need of the vocabulary.

CPU tensors go to C++ where it is built, CUDA tensors (ROCm's too) to Triton, others and float64 to
plain PyTorch. Sums over rows run in a fixed order: no result depends on the number of threads.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from softgrpo_kernels.extension import cpu_extension
from softgrpo_kernels.reference import indexed_dot as reference
from softgrpo_kernels.reference.indexed_dot import wide_dtype

LIBRARY = torch.library.Library("softgrpo_kernels", "FRAGMENT")

# Numbers of the dtypes in C++.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def indexed_dot(hidden: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """z_ij = <hidden_i, table[ids_ij]>, accumulated in fp32 (fp64 for fp64).

    Args:
        hidden: [N, H]; table: [V, H] in the same dtype.
        ids: int [N, K], rows of the table; unused slots < 0. Not checked here.

    Returns:
        [N, K] fp32 (fp64), 0 in unused slots.
    """
    if hidden.is_cuda and hidden.dtype in _DTYPES:
        from softgrpo_kernels.gpu import indexed_dot as gpu

        return gpu.indexed_dot(hidden, table, ids)
    kernels = _cpu_kernels(hidden, table)
    if kernels is None:
        return reference.indexed_dot(hidden, table, ids)
    hidden, table, ids = _unit_stride(hidden), _unit_stride(table), _int32(ids)
    out = torch.empty(ids.shape, dtype=torch.float32)
    kernels.indexed_dot(
        out.data_ptr(),
        hidden.data_ptr(),
        hidden.stride(0),
        ids.data_ptr(),
        *ids.shape,
        table.data_ptr(),
        table.stride(0),
        table.shape[1],
        _DTYPES[table.dtype],
    )
    return out


def indexed_dot_backward_hidden(
    grad: Tensor, table: Tensor, ids: Tensor, dtype: torch.dtype
) -> Tensor:
    """dX_i = sum_j grad_ij table[ids_ij] [N, H], accumulated in fp32, rounded once to `dtype`."""
    if table.is_cuda and table.dtype in _DTYPES:
        from softgrpo_kernels.gpu import indexed_dot as gpu

        return gpu.indexed_dot_backward_hidden(grad, table, ids, dtype)
    kernels = _cpu_kernels(table)
    if kernels is None or dtype != table.dtype:
        return reference.indexed_dot_backward_hidden(grad, table, ids, dtype)
    # The mixture of rows with grad for weights.
    table, ids, grad = _unit_stride(table), _int32(ids), grad.float().contiguous()
    out = table.new_empty((ids.shape[0], table.shape[1]))
    kernels.soft_embedding(
        out.data_ptr(),
        ids.data_ptr(),
        grad.data_ptr(),
        *ids.shape,
        table.data_ptr(),
        table.stride(0),
        table.shape[1],
        _DTYPES[table.dtype],
    )
    return out


def indexed_dot_backward_table(grad: Tensor, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of the table's gradient that are not zero: sum of grad_ij hidden_i.

    Returns:
        rows: int64 [U], ascending, unique. On a device this waits for it.
        values: [U, H] fp32 (fp64 for fp64), summed in order of i, then j.
    """
    kernels = _cpu_kernels(hidden)
    if kernels is None:
        return reference.indexed_dot_backward_table(grad, hidden, ids)
    keys, distinct = _sorted_pairs(kernels, ids)
    rows = torch.empty(distinct, dtype=torch.int64)
    values = torch.empty(distinct, hidden.shape[1])
    _segment_sums(kernels, values, rows, keys, grad, hidden, ids)
    return rows, values


def indexed_dot_add_to_table(table_grad: Tensor, grad: Tensor, hidden: Tensor, ids: Tensor) -> None:
    """table_grad[ids_ij] += grad_ij hidden_i in place, one rounding of (old + the row's sum)."""
    if hidden.is_cuda and hidden.dtype in _DTYPES:
        from softgrpo_kernels.gpu import indexed_dot as gpu

        return gpu.indexed_dot_add_to_table(table_grad, grad, hidden, ids)
    kernels = _cpu_kernels(hidden)
    if kernels is not None and table_grad.dtype in _DTYPES and table_grad.stride(-1) == 1:
        keys, _ = _sorted_pairs(kernels, ids)
        return _segment_sums(kernels, table_grad, None, keys, grad, hidden, ids)
    rows, values = indexed_dot_backward_table(grad, hidden, ids)
    table_grad[rows] = (table_grad[rows].to(values.dtype) + values).to(table_grad.dtype)
    return None


def indexed_dot_backward_dense(
    grad: Tensor, hidden: Tensor, ids: Tensor, rows: int, dtype: torch.dtype
) -> Tensor:
    """The table's whole gradient [rows, H] in `dtype`, exactly 0 where no id points."""
    out = torch.zeros((rows, hidden.shape[1]), dtype=dtype, device=hidden.device)
    indexed_dot_add_to_table(out, grad, hidden, ids)
    return out


def _cpu_kernels(*tensors: Tensor) -> ModuleType | None:
    known = all(x.is_cpu and x.dtype in _DTYPES for x in tensors)
    return cpu_extension() if known else None


def _sorted_pairs(kernels: ModuleType, ids: Tensor) -> tuple[Tensor, int]:
    """(id << 32 | position) of the used slots, ascending, and the number of distinct ids."""
    ids = _int32(ids)
    keys, spare = (torch.empty(ids.numel(), dtype=torch.int64) for _ in range(2))
    pairs = kernels.sort_ids(keys.data_ptr(), spare.data_ptr(), ids.data_ptr(), ids.numel())
    keys = keys[:pairs]
    token = keys >> 32
    return keys, int((token[1:] != token[:-1]).sum()) + min(1, pairs)


def _segment_sums(
    kernels: ModuleType,
    out: Tensor,
    row_ids: Tensor | None,
    keys: Tensor,
    grad: Tensor,
    hidden: Tensor,
    ids: Tensor,
) -> None:
    grad, hidden = grad.float().contiguous(), _unit_stride(hidden)
    kernels.segment_sums(
        out.data_ptr(),
        0 if row_ids is None else row_ids.data_ptr(),
        out.stride(0),
        _DTYPES[out.dtype],
        keys.data_ptr(),
        len(keys),
        grad.data_ptr(),
        hidden.data_ptr(),
        ids.shape[1],
        hidden.stride(0),
        hidden.shape[1],
        _DTYPES[hidden.dtype],
    )


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _int32(ids: Tensor) -> Tensor:
    return ids.to(torch.int32).contiguous()


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    hidden, table, ids = ctx.saved_tensors
    ops = torch.ops.softgrpo_kernels
    d_hidden = d_table = None
    if ctx.needs_input_grad[0]:
        d_hidden = ops.indexed_dot_backward_hidden(grad, table, ids, hidden.dtype)
    if ctx.needs_input_grad[1]:
        d_table = ops.indexed_dot_backward_dense(grad, hidden, ids, table.shape[0], table.dtype)
    return d_hidden, d_table, None


def differentiable_once(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The derivative of a backward op; without one autograd would go on with a warning only."""
    raise RuntimeError("softgrpo_kernels: log-probabilities are differentiable once")


LIBRARY.define("indexed_dot(Tensor hidden, Tensor table, Tensor ids) -> Tensor")
LIBRARY.define(
    "indexed_dot_backward_hidden(Tensor grad, Tensor table, Tensor ids, ScalarType dtype) -> Tensor"
)
LIBRARY.define(
    "indexed_dot_backward_dense(Tensor grad, Tensor hidden, Tensor ids, SymInt rows, "
    "ScalarType dtype) -> Tensor"
)
for _op in (indexed_dot, indexed_dot_backward_hidden, indexed_dot_backward_dense):
    LIBRARY.impl(_op.__name__, _op, "CompositeExplicitAutograd")


def _fake_dot(hidden: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    return hidden.new_empty(ids.shape, dtype=wide_dtype(hidden.dtype))


def _fake_hidden(grad: Tensor, table: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    return table.new_empty((ids.shape[0], table.shape[1]), dtype=dtype)


def _fake_dense(grad: Tensor, hidden: Tensor, ids: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    return hidden.new_empty((rows, hidden.shape[1]), dtype=dtype)


torch.library.register_autograd(
    "softgrpo_kernels::indexed_dot", _differentiate, setup_context=_save_inputs
)
for _name, _fake in (
    ("indexed_dot", _fake_dot),
    ("indexed_dot_backward_hidden", _fake_hidden),
    ("indexed_dot_backward_dense", _fake_dense),
):
    torch.library.register_fake(f"softgrpo_kernels::{_name}", _fake)
for _name in ("indexed_dot_backward_hidden", "indexed_dot_backward_dense"):
    torch.library.register_autograd(f"softgrpo_kernels::{_name}", differentiable_once)
