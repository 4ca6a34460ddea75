"""Rotary positions, and keys and values into their pages, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_engine.ops.extension import compiled


def rope_store_kv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> Tensor:
    """See `softgrpo_engine.ops.rope_store_kv`."""
    qkv, cos, sin, slot_mapping = (t.contiguous() for t in (qkv, cos, sin, slot_mapping))
    num_pages, _, page_size, head_dim = k_pages.shape
    q_TQD = qkv.new_empty(len(qkv), num_heads, head_dim)
    compiled().rope_store_kv(
        q_TQD.data_ptr(),
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        qkv.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        slot_mapping.data_ptr(),
        len(qkv),
        num_heads,
        num_kv_heads,
        head_dim,
        num_pages,
        page_size,
        qkv.dtype == torch.bfloat16,
    )
    return q_TQD
