"""Stage 1 of the soft step: one read of the logits, from which stage 2 needs only a few tiles.

The kernel leaves the maximum of every tile of 128 tokens, and of every chunk of 4096 the sums of a
log-sum-exp. Both sizes are constants: a row's result must not depend on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softgrpo_kernels.gpu.soft_token.row import (
    GREEDY,
    MODE,
    SKIP,
    TEMPERATURE,
    Places,
    float_of,
    int_of,
    row_of,
)
from softgrpo_kernels.gpu.soft_token.rows import Rows

TILE = 128
CHUNK = 4096
_TILE, _CHUNK = tl.constexpr(TILE), tl.constexpr(CHUNK)
# What is left of a chunk: of a = z / T the maximum m, sum exp(a - m), sum exp(a - m) (a - m) if
# asked for, and 1 where a logit is NaN or +inf.
MAXIMUM, MASS, WEIGHTED, BAD = (tl.constexpr(column) for column in range(4))
COLUMNS = tl.constexpr(4)
# Of the histogram of a row's mass: BINS bins of 1 / BINS_PER_NAT, downwards from its maximum.
BINS, BINS_PER_NAT = tl.constexpr(1024), tl.constexpr(32)

# (count int32 [B], histogram int64 [B, BINS]) of what `collect` will list, or no lists.
Lists = tuple[Tensor, Tensor] | tuple[None, None]
NO_LISTS: Lists = (None, None)


@triton.jit(do_not_specialize=["chunks", "columns"])
def statistics_kernel(
    tile_max, chunk_sums, count, histogram, logits, stride, vocabulary, chunks, floats, ints,
    columns, at_row, at_step, phases,
    ENTROPY: tl.constexpr,
):  # fmt: skip
    """Program b chunks + c: chunk c of row b. (A second axis of the grid would end at 65,535.)"""
    index, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    row = row_of(index, floats, ints, columns, 0, Places(at_row, at_step, phases))
    if count is not None:
        begin_list(count, histogram, index, chunk)
    mode = int_of(row, MODE)
    if mode != SKIP:
        temperature = tl.where(mode == GREEDY, 1.0, float_of(row, TEMPERATURE))
        TILES: tl.constexpr = _CHUNK // _TILE
        tile = tl.arange(0, TILES)
        token = chunk * _CHUNK + tile[:, None] * _TILE + tl.arange(0, _TILE)[None, :]
        z = tl.load(
            logits + index * stride + token, mask=token < vocabulary, other=-float("inf")
        ).to(tl.float32)
        best = tl.max(z, axis=1)
        tl.store(tile_max + index * chunks * TILES + chunk * TILES + tile, best)
        bad = tl.max(tl.max(((z != z) | (z == float("inf"))).to(tl.int32), axis=1), axis=0)

        a = tl.div_rn(z, temperature)
        top = tl.div_rn(tl.max(best, axis=0), temperature)
        # Without a finite logit there is nothing to subtract.
        anchor = tl.where(top > -float("inf"), top, 0.0)
        d = a - anchor
        ratio = tl.exp(d)
        place = chunk_sums + (index * chunks + chunk) * COLUMNS
        tl.store(place + MAXIMUM, top)
        tl.store(place + MASS, tl.sum(tl.sum(ratio, axis=1), axis=0))
        if ENTROPY:
            weighted = tl.where(ratio > 0.0, ratio * d, 0.0)
            tl.store(place + WEIGHTED, tl.sum(tl.sum(weighted, axis=1), axis=0))
        tl.store(place + BAD, bad.to(tl.float32))


@triton.jit
def begin_list(count, histogram, index, chunk):
    """No tokens, of no mass, have been listed of a row; its first chunk says so."""
    if chunk == 0:
        tl.store(count + index, 0)
        tl.store(histogram + index * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int64))


@triton.jit
def load_chunks(
    chunk_sums, chunks, COLUMN: tl.constexpr, OTHER: tl.constexpr, CHUNKS: tl.constexpr
):
    """A column of all chunks of the row that begins here."""
    chunk = tl.arange(0, CHUNKS)
    return tl.load(chunk_sums + chunk * COLUMNS + COLUMN, mask=chunk < chunks, other=OTHER)


@triton.jit
def below_top(maxima):
    """(maximum of the row, those of its chunks minus that)."""
    top = tl.max(maxima, axis=0)
    return top, tl.where(maxima > -float("inf"), maxima - top, -1000.0)


def vocabulary_statistics(
    logits: Tensor, rows: Rows, *, need_entropy: bool, lists: Lists = NO_LISTS
) -> tuple[Tensor, Tensor]:
    """Statistics of logits [B, V], unit stride in V; empties the lists.

    Returns:
        tile_max: fp32 [B, tiles], maxima of 128 tokens, -inf past the end.
        chunk_sums: fp32 [B, chunks, COLUMNS], with T = 1 in greedy rows. Skipped rows hold
            anything.
    """
    batch, vocabulary = logits.shape
    chunks = triton.cdiv(vocabulary, CHUNK)
    tile_max = torch.empty((batch, chunks * (CHUNK // TILE)), device=logits.device)
    chunk_sums = torch.empty((batch, chunks, COLUMNS.value), device=logits.device)
    statistics_kernel[(batch * chunks,)](
        tile_max, chunk_sums, *lists, logits, logits.stride(0), vocabulary, chunks, rows.floats,
        rows.ints, rows.columns, *rows.places, ENTROPY=need_entropy, num_warps=8,
    )  # fmt: skip
    return tile_max, chunk_sums
