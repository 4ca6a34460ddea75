"""Causal attention over pages of keys and values, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_engine.ops.extension import compiled


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    query_starts: Tensor | None = None,
) -> Tensor:
    """See `softgrpo_engine.ops.paged_attention`; every tensor is contiguous."""
    rows, num_heads, head_dim = q.shape
    num_pages, num_kv_heads, page_size, _ = k_pages.shape
    out = torch.empty_like(q)
    compiled().paged_attention(
        out.data_ptr(),
        q.data_ptr(),
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        block_table.data_ptr(),
        seq_lens.data_ptr(),
        0 if query_starts is None else query_starts.data_ptr(),
        rows,
        *block_table.shape,
        num_pages,
        page_size,
        num_heads,
        num_kv_heads,
        head_dim,
        scale,
        q.dtype == torch.bfloat16,
    )
    return out
