"""Stage 1 of the soft step: one read of the logits, from which stage 2 needs only a few tiles.

The kernel leaves the maximum of every tile of 128 tokens, and of every chunk of 4096 the sums of a
log-sum-exp. Both sizes are constants: a row's result must not depend on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softgrpo_kernels.row_rules import GREEDY, SKIP
from softgrpo_kernels.rows import RowParameters

TILE = 128
CHUNK = 4096
_TILE, _CHUNK = tl.constexpr(TILE), tl.constexpr(CHUNK)
_GREEDY, _SKIP = tl.constexpr(GREEDY), tl.constexpr(SKIP)


@triton.jit(do_not_specialize=["chunks", "batch"])
def statistics_kernel(
    tile_max, chunk_sums, logits, floats, ints, stride, vocabulary, chunks, batch,
    ENTROPY: tl.constexpr,
):  # fmt: skip
    """Program (c, b): chunk c of row b."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    mode = tl.load(ints + 5 * batch + row)
    if mode != _SKIP:
        temperature = tl.where(mode == _GREEDY, 1.0, tl.load(floats + row))
        TILES: tl.constexpr = _CHUNK // _TILE
        tile = tl.arange(0, TILES)
        token = chunk * _CHUNK + tile[:, None] * _TILE + tl.arange(0, _TILE)[None, :]
        z = tl.load(logits + row * stride + token, mask=token < vocabulary, other=-float("inf")).to(
            tl.float32
        )
        best = tl.max(z, axis=1)
        tl.store(tile_max + row * chunks * TILES + chunk * TILES + tile, best)
        bad = tl.max(tl.max(((z != z) | (z == float("inf"))).to(tl.int32), axis=1), axis=0)

        a = tl.div_rn(z, temperature)
        top = tl.div_rn(tl.max(best, axis=0), temperature)
        # Without a finite logit there is nothing to subtract.
        anchor = tl.where(top > -float("inf"), top, 0.0)
        d = a - anchor
        ratio = tl.exp(d)
        place = chunk_sums + (row * chunks + chunk) * 4
        tl.store(place, top)
        tl.store(place + 1, tl.sum(tl.sum(ratio, axis=1), axis=0))
        if ENTROPY:
            weighted = tl.where(ratio > 0.0, ratio * d, 0.0)
            tl.store(place + 2, tl.sum(tl.sum(weighted, axis=1), axis=0))
        tl.store(place + 3, bad.to(tl.float32))


def vocabulary_statistics(
    logits: Tensor, rows: RowParameters, *, need_entropy: bool
) -> tuple[Tensor, Tensor]:
    """Statistics of logits [B, V], unit stride in V.

    Returns:
        tile_max: fp32 [B, tiles], maxima of 128 tokens, -inf past the end.
        chunk_sums: fp32 [B, chunks, 4], of a = z / T (T = 1 in greedy rows): maximum m,
            sum exp(a - m), sum exp(a - m) (a - m) if asked for, 1 where a chunk holds NaN or +inf.
            Skipped rows hold anything.
    """
    batch, vocabulary = logits.shape
    chunks = triton.cdiv(vocabulary, CHUNK)
    tile_max = torch.empty((batch, chunks * (CHUNK // TILE)), device=logits.device)
    chunk_sums = torch.empty((batch, chunks, 4), device=logits.device)
    statistics_kernel[(chunks, batch)](
        tile_max, chunk_sums, logits, rows.floats, rows.ints, logits.stride(0), vocabulary,
        chunks, batch, ENTROPY=need_entropy, num_warps=8,
    )  # fmt: skip
    return tile_max, chunk_sums
