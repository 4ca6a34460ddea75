"""How packed tokens attend: over the paged KV cache (engine), or over packed groups (trainer)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from softgrpo_kernels import DecoderLayers, paged_attention, rope_store_kv

Rope = tuple[Tensor, Tensor]


class Attention(Protocol):
    """Attention of one forward pass. It owns RoPE, because where K is stored decides the pass."""

    def __call__(self, layer: int, qkv_TE: Tensor, rope: Rope) -> Tensor:
        """Projected [T, (Hq + 2 Hkv) D] -> attended values [T, Hq D]."""
        ...


@dataclass(frozen=True)
class PagedAttention:
    """Causal attention over the KV pages; the keys and values of this pass are stored first.

    k_pages, v_pages: [layers, pages, Hkv, page_size, D]. slot_mapping: int64 [T], the flat slot
    (page * page_size + offset) of each token. block_table: int32 [B, max_pages]. seq_lens: int32
    [B], tokens in the cache including this pass. query_starts: int32 [B + 1] rows of each sequence,
    or None when every sequence has one row (decode). num_heads: Hq.
    """

    k_pages: Tensor
    v_pages: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_starts: Tensor | None
    num_heads: int

    def __call__(self, layer: int, qkv_TE: Tensor, rope: Rope) -> Tensor:
        k_pages, v_pages = self.k_pages[layer], self.v_pages[layer]
        q_TQD = rope_store_kv(
            qkv_TE, *rope, k_pages, v_pages, self.slot_mapping, self.num_heads, k_pages.shape[1]
        )
        out_TQD = paged_attention(
            q_TQD,
            k_pages,
            v_pages,
            self.block_table,
            self.seq_lens,
            scale=q_TQD.shape[-1] ** -0.5,
            query_starts=self.query_starts,
        )
        return out_TQD.flatten(1)

    def through(self, layers: DecoderLayers, x_TH: Tensor, rope: Rope) -> Tensor:
        """The same in every layer of a decoder: normalised hidden states [T, H]."""
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


class GroupAttention:
    """Differentiable causal attention over packed groups ``[prompt | response | response | ...]``.

    A prompt is computed once for all samples of its group: every response attends to its group's
    prompt and to itself. The T packed tokens are padded only inside the two attention calls.

    prompt_lens: tokens of each group's prompt. response_lens: for each group, tokens of each of its
    responses (the packed order).
    """

    def __init__(
        self,
        prompt_lens: Sequence[int],
        response_lens: Sequence[Sequence[int]],
        num_heads: int,
        num_kv_heads: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        prompt_rows: list[list[int]] = []
        response_rows: list[list[int]] = []
        context_rows: list[list[int]] = []
        start = 0
        for prompt_len, lens in zip(prompt_lens, response_lens, strict=True):
            prompt = list(range(start, start + prompt_len))
            start += prompt_len
            prompt_rows.append(prompt)
            for length in lens:
                response_rows.append(list(range(start, start + length)))
                context_rows.append(prompt)
                start += length
        self.length = start
        repeat = num_heads // num_kv_heads
        self._prompts = _PaddedAttention(prompt_rows, [[] for _ in prompt_rows], repeat, device)
        # Samples that ended with their first token feed nothing back.
        pairs = [(r, c) for r, c in zip(response_rows, context_rows, strict=True) if r]
        self._responses = (
            _PaddedAttention([r for r, _ in pairs], [c for _, c in pairs], repeat, device)
            if pairs
            else None
        )

    def __call__(self, layer: int, qkv_TE: Tensor, rope: Rope) -> Tensor:
        head_dim = qkv_TE.shape[-1] // (self.num_heads + 2 * self.num_kv_heads)
        heads = qkv_TE.view(qkv_TE.shape[0], -1, head_dim)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        cos, sin = (part.to(qkv_TE.dtype)[:, None] for part in rope)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        parts = [self._prompts(q, k, v)]
        rows = [self._prompts.rows]
        if self._responses is not None:
            parts.append(self._responses(q, k, v))
            rows.append(self._responses.rows)
        order = torch.argsort(torch.cat(rows))
        return torch.cat(parts).index_select(0, order).flatten(1)


class _PaddedAttention:
    """Attention of n query spans over (context, span), padded to a rectangle for one SDPA call."""

    def __init__(
        self,
        spans: list[list[int]],
        contexts: list[list[int]],
        repeat: int,
        device: torch.device | str,
    ) -> None:
        width = max(len(span) for span in spans)
        context_width = max(len(context) for context in contexts)
        query = torch.zeros(len(spans), width, dtype=torch.int64)
        key = torch.zeros(len(spans), context_width + width, dtype=torch.int64)
        allowed = torch.zeros(len(spans), width, context_width + width, dtype=torch.bool)
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        valid = torch.zeros(len(spans), width, dtype=torch.bool)
        for i, (span, context) in enumerate(zip(spans, contexts, strict=True)):
            query[i, : len(span)] = torch.tensor(span)
            valid[i, : len(span)] = True
            if context:
                key[i, : len(context)] = torch.tensor(context)
            key[i, context_width : context_width + len(span)] = torch.tensor(span)
            allowed[i, :, : len(context)] = True
            # Causal within the span: a real query never sees the padding after it.
            allowed[i, :, context_width:] = causal
        self.rows = torch.tensor([row for span in spans for row in span], device=device)
        self._query, self._key = query.to(device), key.to(device)
        self._valid = valid.flatten().nonzero().squeeze(1).to(device)
        # The query heads that share a KV head are folded into the query length: K and V are
        # never repeated, and SDPA sees plain multi-head attention.
        self._allowed = allowed.repeat(1, repeat, 1)[:, None].to(device)

    def __call__(self, q_TQD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        n, width = self._query.shape
        num_heads, head_dim = q_TQD.shape[1:]
        num_kv_heads = k_TKD.shape[1]
        repeat = num_heads // num_kv_heads
        q = q_TQD.index_select(0, self._query.flatten())
        q = q.view(n, width, num_kv_heads, repeat, head_dim).permute(0, 2, 3, 1, 4)
        q = q.reshape(n, num_kv_heads, repeat * width, head_dim)
        key = self._key.flatten()
        k = k_TKD.index_select(0, key).view(n, -1, num_kv_heads, head_dim).transpose(1, 2)
        v = v_TKD.index_select(0, key).view(n, -1, num_kv_heads, head_dim).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._allowed)
        out = out.view(n, num_kv_heads, repeat, width, head_dim).permute(0, 3, 1, 2, 4)
        return out.reshape(n * width, num_heads, head_dim).index_select(0, self._valid)


def _rotate(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x_THD.shape[-1] // 2
    rotated = torch.cat((-x_THD[..., half:], x_THD[..., :half]), dim=-1)
    return x_THD * cos + rotated * sin
