"""Attention of the trainer: packed groups ``[prompt | response | response | ...]``.

A prompt is computed once for all samples of its group: every response attends to its group's prompt
and to itself. Memory is linear in the number of tokens: no mask and no scores are kept, and on the
CPU the keys of a prompt are not copied for its responses. (Without C++ for a dtype they are.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from softgrpo_engine.model.attention import Rope
from softgrpo_engine.ops.differentiable import group_attention, is_fused, rotate_heads
from softgrpo_engine.transfer import to_device

# What flash attention on a GPU computes.
FLASH_DTYPES = (torch.bfloat16, torch.float16)


class GroupAttention:
    """Differentiable causal attention over the T packed tokens of groups.

    prompt_lens: tokens of each group's prompt. response_lens: for each group, tokens of each of its
    responses (the packed order); one without tokens takes no part.
    On a GPU q, k and v must be bfloat16 or float16.
    """

    def __init__(
        self,
        prompt_lens: Sequence[int],
        response_lens: Sequence[Sequence[int]],
        num_heads: int,
        num_kv_heads: int,
        device: torch.device | str = "cpu",
    ) -> None:
        layout, heads = _Layout.from_lens(prompt_lens, response_lens), (num_heads, num_kv_heads)
        self._attend: Callable[[Tensor, Rope], Tensor]
        if torch.device(device).type == "cpu":
            self._attend = _CpuAttention(layout, *heads)
        else:
            self._attend = _VarlenAttention(layout, *heads, torch.device(device))

    def __call__(self, layer: int, qkv_TE: Tensor, rope: Rope) -> Tensor:
        return self._attend(qkv_TE, rope).flatten(1)


class _CpuAttention:
    """One C++ op; the layers' own dtype where there is no C++ for it, by PyTorch."""

    def __init__(self, layout: _Layout, num_heads: int, num_kv_heads: int) -> None:
        self._layout, self._heads = layout, (num_heads, num_kv_heads)
        tokens = sum(length for _, length in layout.spans)
        places = torch.arange(tokens + 1, dtype=torch.int32)
        self._places = places, places[:-1]  # every key has one
        starts, prefixes = (torch.tensor(part) for part in (layout.spans, layout.prefixes))
        self._spans, self._groups = torch.cat([starts, prefixes], 1), torch.tensor(layout.groups)

    def __call__(self, qkv_TE: Tensor, rope: Rope) -> Tensor:
        if is_fused(qkv_TE):
            heads = rotate_heads(qkv_TE, *rope, *self._places, *self._heads)
            return group_attention(*heads, self._spans, self._groups)
        return _plain_attention(*_rotated_heads(qkv_TE, rope, *self._heads), self._layout)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, layout: _Layout) -> Tensor:
    """The meaning, span after span."""
    outs = []
    for (start, length), (prompt, m) in zip(layout.spans, layout.prefixes, strict=True):
        own, prefix = slice(start, start + length), slice(prompt, prompt + m)
        keys, values = (torch.cat([x[prefix], x[own]]) for x in (k, v))
        q_HTD, k_HTD, v_HTD = (x.transpose(0, 1) for x in (q[own], keys, values))
        sees = torch.ones(length, m + length, dtype=torch.bool).tril(m)
        out = F.scaled_dot_product_attention(q_HTD, k_HTD, v_HTD, sees, enable_gqa=True)
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)


def _rotated_heads(
    qkv_TE: Tensor, rope: Rope, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k [T, heads, D], rotated, and v."""
    heads = qkv_TE.unflatten(1, (num_heads + 2 * num_kv_heads, -1))
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    cos, sin = (part.to(qkv_TE.dtype)[:, None] for part in rope)
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def _rotate(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x_THD.shape[-1] // 2
    rotated = torch.cat((-x_THD[..., half:], x_THD[..., :half]), dim=-1)
    return x_THD * cos + rotated * sin


@dataclass(frozen=True)
class _Layout:
    """Where the spans of the groups lie.

    spans: (start, length) of every prompt and response, in packed order. prefixes: for each of
    them the (start, length) of the prompt it attends to, length 0 for a prompt. groups: the spans
    of group g are groups[g] .. groups[g + 1], its prompt's first.
    """

    spans: list[tuple[int, int]]
    prefixes: list[tuple[int, int]]
    groups: list[int]

    @classmethod
    def from_lens(
        cls, prompt_lens: Sequence[int], response_lens: Sequence[Sequence[int]]
    ) -> _Layout:
        spans, prefixes, groups = [], [], [0]
        end = 0
        for prompt_len, lens in zip(prompt_lens, response_lens, strict=True):
            prompt = (end, prompt_len)
            spans.append(prompt)
            prefixes.append((end, 0))
            end += prompt_len
            for length in filter(None, lens):
                spans.append((end, length))
                prefixes.append(prompt)
                end += length
            groups.append(len(spans))
        return cls(spans, prefixes, groups)


class _VarlenAttention:
    """The same by the packed flash attention of PyTorch, whose causal mask ends with the last key:
    a query span is a response, its keys are prompt and response."""

    def __init__(
        self, layout: _Layout, num_heads: int, num_kv_heads: int, device: torch.device
    ) -> None:
        self._num_heads, self._num_kv_heads = num_heads, num_kv_heads
        keys = [
            torch.cat([torch.arange(p, p + m), torch.arange(start, start + length)])
            for (start, length), (p, m) in zip(layout.spans, layout.prefixes, strict=True)
        ]
        query_lens = [length for _, length in layout.spans]
        key_lens = [len(k) for k in keys]
        rows = torch.cat(keys)  # the packed row of every key
        copies = rows.argsort(stable=True).int()
        counts = rows.bincount(minlength=sum(query_lens))
        self._copies = to_device(_starts(counts.tolist()), device), to_device(copies, device)
        self._query_starts = to_device(_starts(query_lens), device)
        self._key_starts = to_device(_starts(key_lens), device)
        self._longest = max(query_lens), max(key_lens)

    def __call__(self, qkv_TE: Tensor, rope: Rope) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        if qkv_TE.dtype not in FLASH_DTYPES:
            raise ValueError(f"training on a GPU needs model.dtype=bfloat16, not {qkv_TE.dtype}")
        q, k, v = rotate_heads(qkv_TE, *rope, *self._copies, self._num_heads, self._num_kv_heads)
        out = varlen_attn(
            q,
            k,
            v,
            self._query_starts,
            self._key_starts,
            *self._longest,
            window_size=(-1, 0),
            enable_gqa=True,
        )
        assert isinstance(out, Tensor)  # the log-sum-exp was not asked for
        return out


def _starts(lens: list[int]) -> Tensor:
    return torch.tensor([0, *lens]).cumsum(0).int()
