"""Stand-ins for the kernels of `softgrpo_engine.ops.gpu.silu_mul`."""

from __future__ import annotations

import torch
from torch import Tensor

from .memory import rows_of

Grid = tuple[int, ...]


def silu_mul_kernel(
    grid: Grid, out: Tensor, gate: Tensor, up: Tensor, stride: int, width: int, BLOCK_I: int
) -> None:
    assert (grid[1] - 1) * BLOCK_I < width <= grid[1] * BLOCK_I
    g_TI, u_TI = (rows_of(x, grid[0], stride, width).float() for x in (gate, up))
    g_TI = (g_TI / (1.0 + torch.exp(-g_TI))).to(out.dtype).float()
    rows_of(out, grid[0], width, width).copy_(g_TI * u_TI)


def silu_mul_backward_kernel(
    grid: Grid,
    d_gate_up: Tensor,
    d_out: Tensor,
    gate: Tensor,
    up: Tensor,
    stride: int,
    width: int,
    BLOCK_I: int,
) -> None:
    assert (grid[1] - 1) * BLOCK_I < width <= grid[1] * BLOCK_I
    g_TI, u_TI = (rows_of(x, grid[0], stride, width).float() for x in (gate, up))
    d_TI = rows_of(d_out, grid[0], width, width).float()
    s_TI = 1.0 / (1.0 + torch.exp(-g_TI))
    d_gate = rows_of(d_gate_up, grid[0], 2 * width, width)
    d_gate.copy_(d_TI * u_TI * s_TI * (1.0 + g_TI * (1.0 - s_TI)))
    silu_TI = (g_TI * s_TI).to(d_gate_up.dtype).float()
    rows_of(d_gate_up, grid[0], 2 * width, width, begin=width).copy_(d_TI * silu_TI)
