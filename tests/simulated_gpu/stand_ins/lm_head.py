"""Stand-ins for the kernels of `softgrpo_kernels.gpu.soft_token.lm_head`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .memory import first, largest, parameters, rows_of
from .statistics import anchored, begin_lists, mapped, temperature_of

Grid = tuple[int, ...]


def lm_head_kernel(
    grid: Grid,
    logits: Tensor,
    tile_max: Tensor,
    tile_sums: Tensor,
    hidden: Tensor,
    hidden_stride: int,
    weight: Tensor,
    weight_stride: int,
    bias: Tensor | None,
    softcap: float,
    logit_scale: float,
    floats: Tensor,
    ints: Tensor,
    batch: int,
    vocabulary: int,
    width: int,
    tiles: int,
    BIAS: bool,
    SOFTCAP: bool,
    ENTROPY: bool,
    ROWS: int,
    TILE: int,
    BLOCK_H: int,
) -> None:
    assert grid == (-(-batch // ROWS) * tiles,)
    assert vocabulary <= tiles * TILE
    x_BH = rows_of(hidden, batch, hidden_stride, width).float()
    w_VH = rows_of(weight, vocabulary, weight_stride, width).float()
    b_V = None if bias is None or not BIAS else first(bias, vocabulary)
    stored = rows_of(logits, batch, vocabulary, vocabulary)
    stored.copy_(mapped(x_BH @ w_VH.T, b_V, softcap, logit_scale, SOFTCAP))

    filled = -(-vocabulary // TILE)
    z_BV = F.pad(stored.float(), (0, filled * TILE - vocabulary), value=-torch.inf)
    z_BTV = z_BV.view(batch, filled, TILE)
    best, bad = largest(z_BTV), ~(z_BTV < torch.inf).all(-1)
    t = temperature_of(parameters(floats, ints, batch, 1))
    d = anchored(z_BTV / t[..., None], best / t)
    ratio = torch.exp(d)
    # Tiles past the end hold -inf: maximum -inf, sums 0.
    empty = torch.full((batch, tiles - filled), -torch.inf)
    rows_of(tile_max, batch, tiles, tiles).copy_(torch.cat((best, empty), 1))
    planes = first(tile_sums, 3 * batch * tiles).view(3, batch, tiles)
    values = [ratio.sum(-1), None, bad.float()]
    if ENTROPY:
        values[1] = torch.where(ratio > 0.0, ratio * d, 0.0).sum(-1)
    for plane, value in zip(planes, values, strict=True):
        if value is not None:
            plane.copy_(F.pad(value, (0, tiles - filled)))


def combine_kernel(
    grid: Grid,
    chunk_sums: Tensor,
    count: Tensor | None,
    histogram: Tensor | None,
    tile_max: Tensor,
    tile_sums: Tensor,
    floats: Tensor,
    ints: Tensor,
    batch: int,
    tiles: int,
    chunks: int,
    ENTROPY: bool,
    TILES: int,
) -> None:
    assert grid == (batch * chunks,)
    assert tiles == chunks * TILES
    begin_lists(batch, count, histogram)
    t = temperature_of(parameters(floats, ints, batch, 1))
    m = (rows_of(tile_max, batch, tiles, tiles) / t).view(batch, chunks, TILES)
    s, weighted, bad = first(tile_sums, 3 * batch * tiles).view(3, batch, chunks, TILES)
    top = largest(m)
    d = torch.where(m > -torch.inf, m - top[..., None], -1000.0)
    factor = torch.exp(d)
    sums = rows_of(chunk_sums, batch, chunks * 4, chunks * 4).view(batch, chunks, 4)
    sums[..., 0] = top
    sums[..., 1] = (factor * s).sum(-1)
    if ENTROPY:
        sums[..., 2] = (factor * (weighted + s * d)).sum(-1)
    sums[..., 3] = bad.amax(-1)
