"""Stand-ins for the kernels of `softgrpo_engine.ops.gpu.rms_norm`."""

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
    rows_of(out, rows, width, width).copy_(_weight(weight, width, out.dtype) * x_TH)


def _weight(weight: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    return first(weight, width).to(dtype).float()


def rms_norm_backward_kernel(
    grid: Grid,
    d_total: Tensor,
    d_weights: Tensor | None,
    d_out: Tensor,
    d_sum: Tensor | None,
    total: Tensor,
    weight: Tensor,
    rows: int,
    width: int,
    eps: float,
    SUM: bool,
    WEIGHT: bool,
    BLOCK_H: int,
) -> None:
    assert width <= BLOCK_H
    n_TH, g_TH = (rows_of(x, rows, width, width).float() for x in (total, d_out))
    scale = torch.rsqrt((n_TH * n_TH).sum(-1, keepdim=True) / width + eps)
    n_TH = n_TH * scale
    if WEIGHT:
        assert d_weights is not None
        parts = rows_of(d_weights, grid[0], width, width).zero_()
        each = g_TH * n_TH.to(d_total.dtype).float()
        parts.index_add_(0, torch.arange(rows) % grid[0], each)
    g_TH = g_TH * _weight(weight, width, d_total.dtype)
    g_TH = (g_TH - n_TH * ((g_TH * n_TH).sum(-1, keepdim=True) / width)) * scale
    if SUM:
        assert d_sum is not None
        g_TH = g_TH + rows_of(d_sum, rows, width, width).float()
    rows_of(d_total, rows, width, width).copy_(g_TH)
