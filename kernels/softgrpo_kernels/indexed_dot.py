"""Dot products with selected rows of a table: all that the training ops need of the vocabulary.

Sums over rows run in a fixed order: no result depends on the number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softgrpo_kernels.backends import LIBRARY, backend_of
from softgrpo_kernels.cpu import indexed_dot as cpu
from softgrpo_kernels.reference import indexed_dot as reference
from softgrpo_kernels.tensors import DTYPES, wide_dtype


def indexed_dot(hidden: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """z_ij = <hidden_i, table[ids_ij]>, accumulated in fp32 (fp64 for fp64).

    Args:
        hidden: [N, H]; table: [V, H] in the same dtype.
        ids: int [N, K], rows of the table; unused slots < 0. Not checked here.

    Returns:
        [N, K] fp32 (fp64), 0 in unused slots.
    """
    backend = backend_of("auto", hidden.device, hidden.dtype, table.dtype)
    if backend == "triton":
        from softgrpo_kernels.gpu import indexed_dot as gpu

        return gpu.indexed_dot(hidden, table, ids)
    return (cpu if backend == "cpu" else reference).indexed_dot(hidden, table, ids)


def indexed_dot_backward_hidden(
    grad: Tensor, table: Tensor, ids: Tensor, dtype: torch.dtype
) -> Tensor:
    """dX_i = sum_j grad_ij table[ids_ij] [N, H], accumulated in fp32, rounded once to `dtype`."""
    backend = backend_of("auto", table.device, table.dtype)
    if backend == "triton":
        from softgrpo_kernels.gpu import indexed_dot as gpu

        return gpu.indexed_dot_backward_hidden(grad, table, ids, dtype)
    if backend == "cpu" and dtype == table.dtype:
        return cpu.indexed_dot_backward_hidden(grad, table, ids)
    return reference.indexed_dot_backward_hidden(grad, table, ids, dtype)


def indexed_dot_backward_table(grad: Tensor, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of the table's gradient that are not zero: sum of grad_ij hidden_i.

    Returns:
        rows: int64 [U], ascending, unique. On a device this waits for it.
        values: [U, H] fp32 (fp64 for fp64), summed in order of i, then j.
    """
    compiled = backend_of("auto", hidden.device, hidden.dtype) == "cpu"
    return (cpu if compiled else reference).indexed_dot_backward_table(grad, hidden, ids)


def indexed_dot_add_to_table(table_grad: Tensor, grad: Tensor, hidden: Tensor, ids: Tensor) -> None:
    """table_grad[ids_ij] += grad_ij hidden_i in place, one rounding of (old + the row's sum)."""
    backend = backend_of("auto", hidden.device, hidden.dtype)
    if backend == "triton":
        from softgrpo_kernels.gpu import indexed_dot as gpu

        return gpu.indexed_dot_add_to_table(table_grad, grad, hidden, ids)
    if backend == "cpu" and table_grad.dtype in DTYPES and table_grad.stride(-1) == 1:
        return cpu.indexed_dot_add_to_table(table_grad, grad, hidden, ids)
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
