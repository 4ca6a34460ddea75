"""The first candidates of rows, as `gpu.soft_token.select`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .keys import NOTHING, key_of, token_of
from .memory import rows_of


def top_candidates(
    logits: Tensor, stride: int, vocabulary: int, tile_max: Tensor, tiles: int, wanted: Tensor,
    K: int, TILES: int, TILE: int,
) -> Tensor:  # fmt: skip
    """Keys [B, K], descending; NOTHING where there are fewer, and in rows that are not wanted."""
    assert tiles <= TILES
    batch = len(wanted)
    if not bool(wanted.any()):
        return torch.full((batch, K), NOTHING)
    if TILES > K:
        maxima, tile = rows_of(tile_max, batch, tiles, tiles), torch.arange(tiles)
        order = key_of(maxima, tile).masked_fill_(~(maxima > -torch.inf), NOTHING).topk(K).values
        most = max(int((order != NOTHING).sum(-1).max()), 1)
        best_BT = torch.where(order != NOTHING, token_of(order), tiles)[:, :most]
    else:
        best_BT = torch.arange(min(K, tiles, -(-vocabulary // TILE))).expand(batch, -1)
    token = (best_BT[..., None] * TILE + torch.arange(TILE)).flatten(1)
    inside = token < vocabulary
    z = rows_of(logits, batch, stride, vocabulary)
    z = z.gather(1, token.clamp(max=vocabulary - 1)).float()
    keys = key_of(z, token).masked_fill_(~(inside & (z > -torch.inf)), NOTHING)
    keys = keys.topk(min(K, keys.shape[1])).values
    keys = F.pad(keys, (0, K - keys.shape[1]), value=NOTHING)
    return keys.masked_fill_(~wanted[:, None], NOTHING)
