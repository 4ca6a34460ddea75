"""Stand-in for the kernel of `softgrpo_kernels.gpu.row_parameters`."""

from __future__ import annotations

from torch import Tensor

from softgrpo_kernels.row_rules import FLOAT_COLUMNS, INT_COLUMNS

from .memory import first, rows_of

Grid = tuple[int, ...]
Value = float | Tensor


def fill_rows_kernel(
    grid: Grid,
    floats: Tensor,
    ints: Tensor,
    rows: int,
    temperature: Value,
    top_p: Value,
    min_p: Value,
    tau: Value,
    reach: Value,
    noise_scale: Value,
    clamp_low: Value,
    clamp_high: Value,
    eps: Value,
    top_k: Value,
    seed: Value,
    position: Value,
    uid: Value,
    stream: Value,
    mode: Value,
    noise: Value,
    TENSORS: int,
    BLOCK: int,
) -> None:
    assert (grid[0] - 1) * BLOCK < rows <= grid[0] * BLOCK
    values = (
        temperature, top_p, min_p, tau, reach, noise_scale, clamp_low, clamp_high, eps, top_k,
        seed, position, uid, stream, mode, noise,
    )  # fmt: skip
    columns = [
        *rows_of(floats, len(FLOAT_COLUMNS), rows, rows),
        *rows_of(ints, len(INT_COLUMNS), rows, rows),
    ]
    for i, (column, value) in enumerate(zip(columns, values, strict=True)):
        assert isinstance(value, Tensor) == bool(TENSORS >> i & 1)
        if isinstance(value, Tensor):
            column.copy_(first(value, rows))
        else:
            column.fill_(value)
