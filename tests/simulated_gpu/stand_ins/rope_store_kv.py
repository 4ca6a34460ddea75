"""Stand-in for the kernel of `softgrpo_engine.ops.gpu.rope_store_kv`."""

from __future__ import annotations

import torch
from torch import Tensor

from .memory import first, flat, rows_of

Grid = tuple[int, ...]


def rope_store_kv_kernel(
    grid: Grid,
    q_out: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
    num_kv_heads: int,
    PAGE: int,
    DIM: int,
    BLOCK_HEADS: int,
    BLOCK_D: int,
) -> None:
    rows, half, heads = grid[0], DIM // 2, num_heads + 2 * num_kv_heads
    assert (grid[1] - 1) * BLOCK_HEADS < heads <= grid[1] * BLOCK_HEADS
    assert half <= BLOCK_D
    heads_TND = rows_of(qkv, rows, heads * DIM, heads * DIM).view(rows, heads, DIM)
    turning, v_TKD = heads_TND.split([num_heads + num_kv_heads, num_kv_heads], dim=1)
    cos_TD, sin_TD = (rows_of(x, rows, DIM, DIM).to(qkv.dtype)[:, None] for x in (cos, sin))
    # In the dtype of qkv: each product and the sum is rounded.
    swapped = torch.cat((-turning[..., half:], turning[..., :half]), dim=-1)
    q_TQD, k_TKD = (turning * cos_TD + swapped * sin_TD).split([num_heads, num_kv_heads], dim=1)
    rows_of(q_out, rows, num_heads * DIM, num_heads * DIM).copy_(q_TQD.flatten(1))

    slot = first(slot_mapping, rows).long()
    assert int(slot.min()) >= 0, "a slot before the pages"
    page, offset = slot // PAGE, slot % PAGE
    for pages, new_TKD in ((k_pages, k_TKD), (v_pages, v_TKD)):
        memory = flat(pages)
        count = len(memory) // (num_kv_heads * PAGE * DIM)
        memory = memory[: count * num_kv_heads * PAGE * DIM]
        memory.view(count, num_kv_heads, PAGE, DIM)[page, :, offset] = new_TKD.to(pages.dtype)
