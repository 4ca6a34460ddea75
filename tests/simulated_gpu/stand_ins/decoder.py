"""Stand-ins for the kernels of `softgrpo_kernels.gpu.decoder`."""

from __future__ import annotations

import torch
from torch import Tensor

from .memory import first, flat, rows_of

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
    rows_of(out, rows, width, width).copy_(first(weight, width).float() * x_TH)


def silu_mul_kernel(grid: Grid, out: Tensor, gate_up: Tensor, width: int, BLOCK_I: int) -> None:
    assert (grid[1] - 1) * BLOCK_I < width <= grid[1] * BLOCK_I
    gate = rows_of(gate_up, grid[0], 2 * width, width).float()
    up = rows_of(gate_up, grid[0], 2 * width, width, begin=width).float()
    gate = (gate / (1.0 + torch.exp(-gate))).to(out.dtype).float()
    rows_of(out, grid[0], width, width).copy_(gate * up)


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
