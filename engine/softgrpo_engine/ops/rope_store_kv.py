"""Rotary positions, and keys and values into their pages.

Takes float32 and bfloat16: C++ on the CPU, Triton on CUDA and ROCm; other dtypes and devices, and a
CPU without the extension, take plain PyTorch. Records no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_engine.ops import reference
from softgrpo_engine.ops.checks import check_cache, check_ranks, kernels_of


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
    """Rotates q and k (rotate-half RoPE) and stores k and v in the pages, in place.

    Args:
        qkv: [T, (Hq + 2 Hkv) D], the heads of q, then of k, then of v.
        cos, sin: fp32 [T, D] of the tokens' positions.
        k_pages, v_pages: [P, Hkv, page_size, D] in qkv's dtype, contiguous.
        slot_mapping: int64 [T], ``page * page_size + offset`` of each token, all different.

    Returns:
        q [T, Hq, D], rotated. Rounded as Hugging Face: cos and sin to the dtype first, then
        ``x * cos + rotate_half(x) * sin`` with each product and the sum rounded to the dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit; on the CPU also a slot outside the pages.
    """
    kernels = kernels_of(qkv)
    if kernels is None:
        return reference.rope_store_kv(
            qkv, cos, sin, k_pages, v_pages, slot_mapping, num_heads, num_kv_heads
        )
    check_ranks(
        qkv, qkv=(qkv, 2), k_pages=(k_pages, 4), v_pages=(v_pages, 4), cos=(cos, 2), sin=(sin, 2),
        slot_mapping=(slot_mapping, 1),
    )  # fmt: skip
    rows, width = qkv.shape
    page_kv_heads, head_dim = k_pages.shape[1], k_pages.shape[3]
    if (
        k_pages.shape != v_pages.shape
        or page_kv_heads != num_kv_heads
        or width != (num_heads + 2 * num_kv_heads) * head_dim
        or head_dim % 2
    ):
        raise ValueError(
            f"qkv {list(qkv.shape)} with {num_heads} and {num_kv_heads} heads does not fit pages "
            f"{list(k_pages.shape)} and {list(v_pages.shape)} ([P, Hkv, page_size, even D])"
        )
    check_cache(qkv, k_pages, v_pages)
    if cos.shape != (rows, head_dim) or sin.shape != cos.shape or slot_mapping.shape != (rows,):
        raise ValueError(f"rope_store_kv: needs cos, sin [{rows}, {head_dim}], slots [{rows}]")
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise ValueError(f"rope_store_kv: cos and sin must be float32, not {cos.dtype}")
    if slot_mapping.dtype != torch.int64:
        raise ValueError(f"rope_store_kv: slot_mapping must be int64, not {slot_mapping.dtype}")
    return kernels.rope_store_kv(
        qkv, cos, sin, k_pages, v_pages, slot_mapping, num_heads, num_kv_heads
    )
