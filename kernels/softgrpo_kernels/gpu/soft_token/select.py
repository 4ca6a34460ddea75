"""Stage 2 of the soft step: the first candidates of every row, from the tiles that can hold any."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softgrpo_kernels.gpu.soft_token.keys import NOTHING, key_of, token_of
from softgrpo_kernels.gpu.soft_token.row import GREEDY, MODE, Row, int_of, is_listed
from softgrpo_kernels.gpu.soft_token.statistics import TILE
from softgrpo_kernels.row_parameters import RowParameters


@triton.jit
def top_candidates(
    logits, tile_max, vocabulary, tiles,
    K: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Keys of the first K tokens of a row, descending; NOTHING where there are fewer.

    A token among the first K lies in one of the first K tiles by (maximum, position): fewer than K
    tiles have a token before it.
    """
    tile = tl.arange(0, TILES)
    maxima = tl.load(tile_max + tile, mask=tile < tiles, other=-float("inf"))
    tile_keys = tl.where(maxima > -float("inf"), key_of(maxima, tile), NOTHING)
    if TILES > K:
        tile_keys = tl.topk(tile_keys, K)
        best = tl.where(tile_keys != NOTHING, token_of(tile_keys), tiles)
    else:
        best = tl.arange(0, K)
    token = best[:, None] * TILE + tl.arange(0, TILE)[None, :]
    z = tl.load(logits + token, mask=token < vocabulary, other=-float("inf")).to(tl.float32)
    keys = tl.where(z > -float("inf"), key_of(z, token), NOTHING)
    return tl.topk(tl.reshape(keys, [K * TILE]), K)


@triton.jit(do_not_specialize=["tiles", "batch", "k_max"])
def select_kernel(
    out_keys, logits, stride, vocabulary, tile_max, tiles, ints, batch, k_max,
    K: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program b: the keys of the first K tokens of row b, where anybody asks for them."""
    index = tl.program_id(0).to(tl.int64)
    row = Row(None, ints, batch, index, k_max)
    if is_listed(row) | (int_of(row, MODE) == GREEDY):
        keys = top_candidates(
            logits + index * stride, tile_max + index * tiles, vocabulary, tiles, K, TILES, TILE
        )
        tl.store(out_keys + index * K + tl.arange(0, K), keys)


def select(logits: Tensor, tile_max: Tensor, rows: RowParameters) -> Tensor:
    """Keys int64 [B, K], K the power of two that k_max fits into; rows that need none are empty.

    logits: [B, V], unit stride in V; tile_max: as `vocabulary_statistics` returns it.
    """
    (batch, vocabulary), tiles = logits.shape, tile_max.shape[1]
    k = triton.next_power_of_2(max(rows.k_max, 2))
    keys = torch.empty((batch, k), dtype=torch.int64, device=logits.device)
    select_kernel[(batch,)](
        keys, logits, logits.stride(0), vocabulary, tile_max, tiles, rows.ints, batch, rows.k_max,
        K=k, TILES=max(triton.next_power_of_2(tiles), k), TILE=TILE,
        num_warps=4 if k <= 16 else 8,
    )  # fmt: skip
    return keys
