"""Stage 1 of the soft step from the last hidden states: the LM head with the statistics of its
logits in the epilogue (a few rows: the weight is read once, the logits are never read back whole).

The tile of the product is a constant: a row's bits must not depend on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softgrpo_kernels.gpu.rounding import INTERPRET, rounded
from softgrpo_kernels.gpu.soft_token.row import GREEDY, MODE, TEMPERATURE
from softgrpo_kernels.gpu.soft_token.rows import Rows
from softgrpo_kernels.gpu.soft_token.statistics import (
    BAD,
    CHUNK,
    COLUMNS,
    MASS,
    MAXIMUM,
    NO_LISTS,
    TILE,
    WEIGHTED,
    Lists,
    begin_list,
)
from softgrpo_kernels.gpu.softcap import scaled_and_capped
from softgrpo_kernels.lm_head import LMHead
from softgrpo_kernels.tensors import unit_stride

# More rows than these and the product is bound by arithmetic: cuBLAS is better at that.
MOST_ROWS = 128
ROWS, BLOCK_BYTES = 64, 128


@triton.jit
def _temperature(floats, ints, row, inside, batch):
    mode = tl.load(ints + batch * MODE + row, mask=inside, other=GREEDY)
    t = tl.load(floats + batch * TEMPERATURE + row, mask=inside, other=1.0)
    return tl.where(mode == GREEDY, 1.0, t)


@triton.jit
def _product(
    weight, weight_stride, token, vocabulary, hidden, hidden_stride, row, batch, width,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """fp32 [tokens, rows]."""
    total = tl.zeros([token.shape[0], row.shape[0]], tl.float32)
    weight += token[:, None].to(tl.int64) * weight_stride
    hidden += row[None, :].to(tl.int64) * hidden_stride
    for begin in range(0, width, BLOCK_H):
        h = begin + tl.arange(0, BLOCK_H)
        inside = h < width
        w = tl.load(
            weight + h[None, :], mask=(token < vocabulary)[:, None] & inside[None, :], other=0.0
        )
        x = tl.load(hidden + h[:, None], mask=(row < batch)[None, :] & inside[:, None], other=0.0)
        if INTERPRET:
            w, x = w.to(tl.float32), x.to(tl.float32)
        total = tl.dot(w, x, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["batch", "tiles"])
def lm_head_kernel(
    logits, tile_max, tile_sums, hidden, hidden_stride, weight, weight_stride, bias, softcap,
    logit_scale, floats, ints, batch, vocabulary, width, tiles,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Program t ceil(B / ROWS) + r: TILE logits of ROWS rows, their maxima and the sums of a
    log-sum-exp. Blocks of rows that share a tile of the weight run side by side and find it in the
    cache."""
    row_blocks = tl.cdiv(batch, ROWS)
    row = tl.program_id(0) % row_blocks * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(0) // row_blocks
    token = tile * TILE + tl.arange(0, TILE)
    z = _product(
        weight, weight_stride, token, vocabulary, hidden, hidden_stride, row, batch, width, BLOCK_H
    )
    real_token, real_row = token < vocabulary, row < batch
    if BIAS:
        z += tl.load(bias + token, mask=real_token, other=0.0).to(tl.float32)[:, None]
    z = scaled_and_capped(z, logit_scale, softcap, SOFTCAP)
    stored = rounded(z, logits.dtype.element_ty)
    place = row[None, :].to(tl.int64) * vocabulary + token[:, None]
    tl.store(logits + place, stored, mask=real_token[:, None] & real_row[None, :])

    z = tl.where(real_token[:, None], stored.to(tl.float32), -float("inf"))
    best = tl.max(z, axis=0)
    bad = tl.max(((z != z) | (z == float("inf"))).to(tl.int32), axis=0)
    t = _temperature(floats, ints, row, real_row, batch)
    top = tl.div_rn(best, t)
    # Without a finite logit there is nothing to subtract.
    d = tl.div_rn(z, t[None, :]) - tl.where(top > -float("inf"), top, 0.0)[None, :]
    ratio = tl.exp(d)
    at, plane = row.to(tl.int64) * tiles + tile, tl.cast(batch, tl.int64) * tiles
    tl.store(tile_max + at, best, mask=real_row)
    tl.store(tile_sums + at, tl.sum(ratio, axis=0), mask=real_row)
    if ENTROPY:
        weighted = tl.sum(tl.where(ratio > 0.0, ratio * d, 0.0), axis=0)
        tl.store(tile_sums + plane + at, weighted, mask=real_row)
    tl.store(tile_sums + 2 * plane + at, bad.to(tl.float32), mask=real_row)


@triton.jit(do_not_specialize=["batch", "tiles", "chunks"])
def combine_kernel(
    chunk_sums, count, histogram, tile_max, tile_sums, floats, ints, batch, tiles, chunks,
    ENTROPY: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Program b chunks + c: chunk c of row b from its TILES tiles."""
    row, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    if count is not None:
        begin_list(count, histogram, row, chunk)
    t = _temperature(floats, ints, row, row < batch, batch)
    tile = row * tiles + chunk * TILES + tl.arange(0, TILES)
    plane = tl.cast(batch, tl.int64) * tiles
    m = tl.div_rn(tl.load(tile_max + tile), t)
    s = tl.load(tile_sums + tile)
    top = tl.max(m, axis=0)
    d = tl.where(m > -float("inf"), m - top, -1000.0)
    factor = tl.exp(d)
    place = chunk_sums + (row * chunks + chunk) * COLUMNS
    tl.store(place + MAXIMUM, top)
    tl.store(place + MASS, tl.sum(factor * s, axis=0))
    if ENTROPY:
        weighted = tl.load(tile_sums + plane + tile)
        tl.store(place + WEIGHTED, tl.sum(factor * (weighted + s * d), axis=0))
    tl.store(place + BAD, tl.max(tl.load(tile_sums + 2 * plane + tile), axis=0))


def lm_head_statistics(
    head: LMHead, rows: Rows, *, need_entropy: bool, lists: Lists = NO_LISTS
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B, V] in the hidden states' dtype, and what `vocabulary_statistics` says of them.
    rows: of the batch."""
    hidden, weight = unit_stride(head.hidden), unit_stride(head.weight)
    batch, (vocabulary, width), device = len(hidden), weight.shape, hidden.device
    chunks = triton.cdiv(vocabulary, CHUNK)
    tiles = chunks * (CHUNK // TILE)
    logits = torch.empty((batch, vocabulary), dtype=hidden.dtype, device=device)
    tile_max = torch.empty((batch, tiles), device=device)
    tile_sums = torch.empty((3, batch, tiles), device=device)
    chunk_sums = torch.empty((batch, chunks, COLUMNS.value), device=device)
    lm_head_kernel[(triton.cdiv(batch, ROWS) * tiles,)](
        logits, tile_max, tile_sums, hidden, hidden.stride(0), weight, weight.stride(0),
        None if head.bias is None else head.bias.contiguous(), float(head.softcap or 0.0),
        float(head.logit_scale), rows.floats, rows.ints, batch, vocabulary, width, tiles,
        BIAS=head.bias is not None, SOFTCAP=head.softcap is not None, ENTROPY=need_entropy,
        ROWS=ROWS, TILE=TILE, BLOCK_H=BLOCK_BYTES // weight.element_size(),
        num_warps=8, num_stages=3,
    )  # fmt: skip
    combine_kernel[(batch * chunks,)](
        chunk_sums, *lists, tile_max, tile_sums, rows.floats, rows.ints, batch, tiles, chunks,
        ENTROPY=need_entropy, TILES=CHUNK // TILE, num_warps=1,
    )  # fmt: skip
    return logits, tile_max, chunk_sums
