"""How packed tokens attend: the interface, and attention over the paged KV cache (engine).

The trainer's is in `softgrpo_engine.training.group_attention`, other libraries' kernels over the
pages are in `softgrpo_engine.execution.attention_backends`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from softgrpo_engine.ops.decoder_layers import DecoderLayers
from softgrpo_engine.ops.paged_attention import paged_attention
from softgrpo_engine.ops.rope_store_kv import rope_store_kv

Rope = tuple[Tensor, Tensor]


class Attention(Protocol):
    """Attention of one forward pass. It owns RoPE, because where K is stored decides the pass."""

    def __call__(self, layer: int, qkv_TE: Tensor, rope: Rope) -> Tensor:
        """Projected [T, (Hq + 2 Hkv) D] -> attended values [T, Hq D]."""
        ...


def attend_by_kernels(
    batch: PagedAttention, q_TQD: Tensor, k_pages: Tensor, v_pages: Tensor
) -> Tensor:
    """Our kernels: C++ on the CPU, Triton on a GPU."""
    return paged_attention(
        q_TQD,
        k_pages,
        v_pages,
        batch.block_table,
        batch.seq_lens,
        scale=q_TQD.shape[-1] ** -0.5,
        query_starts=batch.query_starts,
    )


@dataclass(frozen=True)
class PagedAttention:
    """Causal attention over the KV pages; the keys and values of this pass are stored first.

    k_pages, v_pages: [layers, pages, Hkv, page_size, D]. slot_mapping: int64 [T], the flat slot
    (page * page_size + offset) of each token. block_table: int32 [B, max_pages]. seq_lens: int32
    [B], tokens in the cache including this pass. query_starts: int32 [B + 1] rows of each sequence,
    or None when every sequence has one row (decode). num_heads: Hq. attend: computes
    (this, q [T, Hq, D], pages of a layer) -> [T, Hq, D].
    """

    k_pages: Tensor
    v_pages: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_starts: Tensor | None
    num_heads: int
    attend: Callable[[PagedAttention, Tensor, Tensor, Tensor], Tensor] = attend_by_kernels

    def __call__(self, layer: int, qkv_TE: Tensor, rope: Rope) -> Tensor:
        k_pages, v_pages = self.k_pages[layer], self.v_pages[layer]
        q_TQD = rope_store_kv(
            qkv_TE, *rope, k_pages, v_pages, self.slot_mapping, self.num_heads, k_pages.shape[1]
        )
        return self.attend(self, q_TQD, k_pages, v_pages).flatten(1)

    def through(self, layers: DecoderLayers, x_TH: Tensor, rope: Rope) -> Tensor:
        """The same in every layer of a decoder, by our kernels: normalised hidden states."""
        return layers(
            x_TH,
            *rope,
            self.k_pages,
            self.v_pages,
            self.slot_mapping,
            self.block_table,
            self.seq_lens,
            self.query_starts,
        )
