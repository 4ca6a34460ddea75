"""Stand-in for the kernel of `softgrpo_kernels.gpu.soft_token.select`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from softgrpo_kernels.row_rules import DISCRETE, GREEDY, INT_COLUMNS, SOFT

from .keys import NOTHING, key_of, token_of
from .memory import rows_of, write

Grid = tuple[int, ...]


def select_kernel(
    grid: Grid,
    out_keys: Tensor,
    logits: Tensor,
    stride: int,
    vocabulary: int,
    tile_max: Tensor,
    tiles: int,
    ints: Tensor,
    batch: int,
    k_max: int,
    K: int,
    TILES: int,
    TILE: int,
) -> None:
    assert grid == (batch,)
    assert tiles <= TILES
    table = rows_of(ints, len(INT_COLUMNS), batch, batch)
    modes, sizes = (table[INT_COLUMNS.index(name)].tolist() for name in ("mode", "top_k"))
    wanted = [
        mode == GREEDY or (mode in (DISCRETE, SOFT) and 1 <= top_k <= k_max)
        for mode, top_k in zip(modes, sizes, strict=True)
    ]
    if not any(wanted):
        return
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
    write(rows_of(out_keys, batch, K, K), keys, torch.tensor(wanted)[:, None])
