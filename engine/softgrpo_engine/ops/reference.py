"""Reference of the decoder's inference ops: plain PyTorch on any device, float64 included.

Arguments and results are described where the ops are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """Gathers the pages of one sequence at a time and attends in fp32 (float64 stays float64)."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    page_size = k_pages.shape[2]
    starts = range(q.shape[0] + 1) if query_starts is None else query_starts.tolist()
    out = torch.empty_like(q)
    for b, length in enumerate(seq_lens.tolist()):
        begin, end = starts[b], starts[b + 1]
        if begin == end:
            continue
        pages = block_table[b, : -(-length // page_size)].long()
        k_KSD, v_KSD = (
            cache[pages].transpose(0, 1).flatten(1, 2)[:, :length].to(wide)
            for cache in (k_pages, v_pages)
        )
        q_KGND = q[begin:end].to(wide).unflatten(1, (k_KSD.shape[0], -1)).permute(1, 2, 0, 3)
        scores_KGNS = q_KGND @ k_KSD.mT[:, None] * scale
        positions = torch.arange(length, device=q.device)
        hidden_NS = positions > positions[length - (end - begin) :, None]
        probs_KGNS = scores_KGNS.masked_fill(hidden_NS, float("-inf")).softmax(-1)
        out_KGND = probs_KGNS @ v_KSD[:, None]
        out[begin:end] = out_KGND.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)
    return out


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square norm with the roundings of Hugging Face's Llama."""
    if residual is not None:
        residual = residual + x
        x = residual
    wide = x if x.dtype == torch.float64 else x.float()
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    out = weight * normalised.to(x.dtype)
    return out if residual is None else (out, residual)


def silu_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``, each rounded to the dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


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
    """Rotates q and k, stores k and v in the pages, returns q."""
    head_dim, page_size = k_pages.shape[3], k_pages.shape[2]
    heads_TND = qkv.unflatten(1, (-1, head_dim))
    rotated_TND, v_TKD = heads_TND.split([num_heads + num_kv_heads, num_kv_heads], dim=1)
    cos, sin = (part.to(qkv.dtype)[:, None] for part in (cos, sin))
    half = head_dim // 2
    turned = torch.cat((-rotated_TND[..., half:], rotated_TND[..., :half]), dim=-1)
    q_TQD, k_TKD = (rotated_TND * cos + turned * sin).split([num_heads, num_kv_heads], dim=1)
    page, offset = slot_mapping // page_size, slot_mapping % page_size
    k_pages[page, :, offset] = k_TKD
    v_pages[page, :, offset] = v_TKD
    return q_TQD.contiguous()
