"""Causal attention over pages of keys and values.

Takes float32 and bfloat16: C++ on the CPU, Triton on CUDA and ROCm; other dtypes and devices, and a
CPU without the extension, take plain PyTorch. Records no gradient."""

from __future__ import annotations

from torch import Tensor

from softgrpo_engine.ops import reference
from softgrpo_engine.ops.checks import check_cache, check_ranks, int32, kernels_of


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
    """Causal attention of the last tokens of each sequence over its pages of keys and values.

    Args:
        q: [T, Hq, D] queries; query head h reads KV head ``h // (Hq / Hkv)``.
        k_pages, v_pages: [P, Hkv, page_size, D] in q's dtype, contiguous. Slots that no sequence
            fills are never read.
        block_table: int32 [B, max_pages], the pages of each sequence in order.
        seq_lens: int32 [B], tokens of each sequence in the cache, the T queries included.
        scale: factor on the scores before the softmax.
        query_starts: int32 [B + 1]; rows ``query_starts[b]:query_starts[b + 1]`` of q are the last
            tokens of sequence b, in order. None: one row for every sequence (decode).

    Returns:
        [T, Hq, D] in q's dtype: fp32 softmax and accumulation, one rounding. A row has the same
        bits whatever the batch and the way its sequence was cut into calls, but on a GPU those of
        decode and of query_starts differ; on the CPU also whatever the thread count and page size.

    Raises:
        ValueError: shapes or dtypes that do not fit. On the CPU also: a sequence with more queries
            than tokens or more tokens than its pages hold, a page outside the cache.
    """
    kernels = kernels_of(q)
    if kernels is None:
        return reference.paged_attention(
            q, k_pages, v_pages, block_table, seq_lens, scale=scale, query_starts=query_starts
        )
    check_ranks(
        q, q=(q, 3), k_pages=(k_pages, 4), v_pages=(v_pages, 4), block_table=(block_table, 2),
        seq_lens=(seq_lens, 1),
    )  # fmt: skip
    _, num_heads, head_dim = q.shape
    num_kv_heads = k_pages.shape[1]
    if k_pages.shape != v_pages.shape or k_pages.shape[3] != head_dim or num_heads % num_kv_heads:
        raise ValueError(
            f"q {list(q.shape)}, k_pages {list(k_pages.shape)}, v_pages {list(v_pages.shape)}: "
            "need [T, Hq, D] and two equal [P, Hkv, page_size, D] with Hq a multiple of Hkv"
        )
    check_cache(q, k_pages, v_pages)
    sequences = block_table.shape[0]
    starts = sequences + 1 if query_starts is None else query_starts.numel()
    if seq_lens.numel() != sequences or starts != sequences + 1:
        raise ValueError(
            f"block_table has {sequences} rows: need seq_lens [{sequences}] (has "
            f"{seq_lens.numel()}) and query_starts [{sequences + 1}] (has {starts})"
        )
    q, block_table, seq_lens = q.contiguous(), int32(block_table), int32(seq_lens)
    query_starts = None if query_starts is None else int32(query_starts)
    return kernels.paged_attention(
        q, k_pages, v_pages, block_table, seq_lens, scale=scale, query_starts=query_starts
    )
