"""Memory as a kernel sees it: what lies behind the address of a tensor's first element.

A kernel knows no shapes and strides but those it is told, so the stand-ins build their views from
the arguments of the launch. A view that reaches past the end of the allocation raises, which a
device would not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_kernels.row_parameters import RowParameters
from softgrpo_kernels.row_rules import FLOAT_COLUMNS, INT_COLUMNS


def flat(tensor: Tensor) -> Tensor:
    """1-d, from the tensor's first element to the end of its storage."""
    start = tensor.storage_offset()
    size = tensor.untyped_storage().nbytes() // tensor.element_size() - start
    return tensor.detach().as_strided((size,), (1,), start)


def first(tensor: Tensor, count: int) -> Tensor:
    """The first `count` elements."""
    return tensor.detach().as_strided((count,), (1,), tensor.storage_offset())


def rows_of(tensor: Tensor, rows: int, stride: int, width: int, begin: int = 0) -> Tensor:
    """[rows, width], rows `stride` elements apart, the first one `begin` elements in."""
    return tensor.detach().as_strided((rows, width), (stride, 1), tensor.storage_offset() + begin)


def table_of(tensor: Tensor, stride: int, width: int) -> Tensor:
    """[rows, width]: every row that the memory holds."""
    memory = flat(tensor)
    assert 0 < width <= stride, f"rows of {width} elements, {stride} apart"
    return memory.as_strided(((len(memory) - width) // stride + 1, width), (stride, 1))


def write(target: Tensor, value: Tensor, where: Tensor) -> None:
    """target = value, rounded to its dtype, where the (broadcast) mask is set."""
    torch.where(where, value.to(target.dtype), target, out=target)


def parameters(floats: Tensor, ints: Tensor, columns: int, k_max: int) -> RowParameters:
    """The tables of the rows' parameters."""
    return RowParameters(
        rows_of(floats, len(FLOAT_COLUMNS), columns, columns),
        rows_of(ints, len(INT_COLUMNS), columns, columns),
        k_max,
    )


def parameters_at(
    batch: int, floats: Tensor, ints: Tensor, columns: int, k_max: int, at_row: Tensor | None,
    at_step: Tensor | None, phases: Tensor | None,
) -> RowParameters:  # fmt: skip
    """Those of the rows of a batch, which stand in a record or are the tables'."""
    tables = parameters(floats, ints, columns, k_max)
    if at_row is None or at_step is None or phases is None:
        assert columns == batch
        return tables
    row, step = first(at_row, batch), first(at_step, batch)
    column = first(phases, columns // 2)[row].long() * (columns // 2) + row
    rows = RowParameters(tables.floats[:, column], tables.ints[:, column], k_max)
    rows.position.add_(step)
    return rows


def largest(x: Tensor, dim: int = -1) -> Tensor:
    """Maximum; NaN is passed over, as `tl.max` does, unless there is nothing else."""
    best = x.amax(dim)
    if bool(best.isnan().any()):
        best = torch.where(x.isnan(), -torch.inf, x).amax(dim)
        best = torch.where(x.isnan().all(dim), torch.nan, best)
    return best
