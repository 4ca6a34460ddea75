"""Stand-in for the kernel of `softgrpo_engine.ops.gpu.silu_mul`."""

from __future__ import annotations

import torch
from torch import Tensor

from .memory import rows_of

Grid = tuple[int, ...]


def silu_mul_kernel(grid: Grid, out: Tensor, gate_up: Tensor, width: int, BLOCK_I: int) -> None:
    assert (grid[1] - 1) * BLOCK_I < width <= grid[1] * BLOCK_I
    gate = rows_of(gate_up, grid[0], 2 * width, width).float()
    up = rows_of(gate_up, grid[0], 2 * width, width, begin=width).float()
    gate = (gate / (1.0 + torch.exp(-gate))).to(out.dtype).float()
    rows_of(out, grid[0], width, width).copy_(gate * up)
