"""Stand-in for the kernel of `softgrpo_engine.ops.gpu.rms_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from .memory import first, rows_of

Grid = tuple[int, ...]


def rms_norm_kernel(
    grid: Grid,
    out: Tensor,
    total: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    width: int,
    eps: float,
    RESIDUAL: bool,
    BLOCK_H: int,
) -> None:
    assert width <= BLOCK_H
    rows = grid[0]
    x_TH = rows_of(x, rows, width, width).float()
    if RESIDUAL:
        assert total is not None
        assert residual is not None
        x_TH = x_TH + rows_of(residual, rows, width, width).float()
        x_TH = x_TH.to(out.dtype).float()
        rows_of(total, rows, width, width).copy_(x_TH)
    scale = torch.rsqrt((x_TH * x_TH).sum(-1, keepdim=True) / width + eps)
    x_TH = (x_TH * scale).to(out.dtype).float()
    rows_of(out, rows, width, width).copy_(first(weight, width).float() * x_TH)
