"""Stand-in for the kernel of `gpu.soft_token.statistics`, and what others share with it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from softgrpo_kernels.gpu.soft_token.statistics import BINS, CHUNK, TILE
from softgrpo_kernels.row_parameters import RowParameters
from softgrpo_kernels.row_rules import GREEDY, SKIP

from .memory import first, largest, parameters_at, rows_of, write

Grid = tuple[int, ...]


def mapped(
    dots: Tensor, bias: Tensor | None, softcap: float, logit_scale: float, with_softcap: bool
) -> Tensor:
    """fp32 logits before the temperature from dot products."""
    z = dots.float() if bias is None else dots.float() + bias.float()
    z = z * logit_scale
    if with_softcap:
        z = softcap * (1.0 - 2.0 / (torch.exp(2.0 * z / softcap) + 1.0))
    return z


def temperature_of(rows: RowParameters) -> Tensor:
    """[B, 1], 1 in greedy rows."""
    return torch.where(rows.mode == GREEDY, 1.0, rows.temperature)[:, None]


def anchored(a: Tensor, top: Tensor) -> Tensor:
    """a - top along the last axis; without a finite logit there is nothing to subtract."""
    return a - torch.where(top > -torch.inf, top, 0.0)[..., None]


def begin_lists(batch: int, count: Tensor | None, histogram: Tensor | None) -> None:
    """Nothing is listed of any row."""
    if count is not None and histogram is not None:
        first(count, batch).zero_()
        first(histogram, batch * BINS.value).zero_()


def statistics_kernel(
    grid: Grid,
    tile_max: Tensor,
    chunk_sums: Tensor,
    count: Tensor | None,
    histogram: Tensor | None,
    logits: Tensor,
    stride: int,
    vocabulary: int,
    chunks: int,
    floats: Tensor,
    ints: Tensor,
    columns: int,
    at_row: Tensor | None,
    at_step: Tensor | None,
    phases: Tensor | None,
    ENTROPY: bool,
) -> None:
    batch = grid[0] // chunks
    assert grid == (batch * chunks,)
    assert (chunks - 1) * CHUNK < vocabulary <= chunks * CHUNK
    begin_lists(batch, count, histogram)
    rows = parameters_at(batch, floats, ints, columns, 1, at_row, at_step, phases)
    active, per_chunk = (rows.mode != SKIP)[:, None], CHUNK // TILE
    # Of a single chunk only the tiles that hold anything: the rest adds nothing to the sums.
    tiles = -(-vocabulary // TILE) if chunks == 1 else chunks * per_chunk
    z_BV = rows_of(logits, batch, stride, vocabulary).float()
    z_BV = F.pad(z_BV, (0, tiles * TILE - vocabulary), value=-torch.inf)
    best = largest(z_BV.view(batch, tiles, TILE))
    padded = F.pad(best, (0, chunks * per_chunk - tiles), value=-torch.inf)
    write(rows_of(tile_max, batch, chunks * per_chunk, chunks * per_chunk), padded, active)

    temperature, bad = temperature_of(rows), ~(z_BV < torch.inf).view(batch, chunks, -1).all(-1)
    top = largest(best.view(batch, chunks, -1)) / temperature
    d = anchored((z_BV / temperature).view(batch, chunks, -1), top)
    ratio = torch.exp(d)
    sums = rows_of(chunk_sums, batch, chunks * 4, chunks * 4).view(batch, chunks, 4)
    write(sums[..., 0], top, active)
    write(sums[..., 1], ratio.sum(-1), active)
    if ENTROPY:
        write(sums[..., 2], torch.where(ratio > 0.0, ratio * d, 0.0).sum(-1), active)
    write(sums[..., 3], bad, active)
