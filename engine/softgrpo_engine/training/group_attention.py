"""Attention of the trainer: packed groups ``[prompt | response | response | ...]``.

A prompt is computed once for all samples of its group: every response attends to its group's prompt
and to itself. Memory is linear in the number of tokens: no mask and no scores are kept, and on the
CPU the keys of a prompt are not copied for its responses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softgrpo_engine.model.attention import Rope
from softgrpo_engine.ops.differentiable import is_fused, rotate_heads
from softgrpo_engine.ops.linear import product_dtype
from softgrpo_engine.transfer import to_device

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# Up to so many tokens the backward is faster in float32, three times at 70: in bfloat16 it goes
# through oneDNN for every tile of 64 x 64.
_SHORT_SPAN = 256
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
    """Every key has one place; the prompts' are read there by all responses."""

    def __init__(self, layout: _Layout, num_heads: int, num_kv_heads: int) -> None:
        places = torch.arange(sum(length for _, length in layout.spans) + 1, dtype=torch.int32)
        self._places = places, places[:-1]
        self._layout, self._heads = layout, (num_heads, num_kv_heads)

    def __call__(self, qkv_TE: Tensor, rope: Rope) -> Tensor:
        if is_fused(qkv_TE):
            heads = rotate_heads(qkv_TE, *rope, *self._places, *self._heads)
        else:
            heads = _rotated_heads(qkv_TE, rope, *self._heads)
        return _PrefixAttention.apply(*heads, self._layout)


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
    them the (start, length) of the prompt it attends to, length 0 for a prompt. groups: (start of
    the prompt, start of the responses, end). buckets: the spans by length, in rectangles.
    """

    spans: list[tuple[int, int]]
    prefixes: list[tuple[int, int]]
    groups: list[tuple[int, int, int]]
    buckets: list[_Bucket]

    @classmethod
    def from_lens(
        cls, prompt_lens: Sequence[int], response_lens: Sequence[Sequence[int]]
    ) -> _Layout:
        spans, prefixes, groups = [], [], []
        start = 0
        for prompt_len, lens in zip(prompt_lens, response_lens, strict=True):
            prompt = (start, prompt_len)
            spans.append(prompt)
            prefixes.append((start, 0))
            end = start + prompt_len
            for length in filter(None, lens):
                spans.append((end, length))
                prefixes.append(prompt)
                end += length
            groups.append((start, start + prompt_len, end))
            start = end
        return cls(spans, prefixes, groups, list(_buckets(spans)))


@dataclass(frozen=True)
class _Bucket:
    """n spans padded to the longest of them. rows: int64, their packed rows; places: int64, where
    those stand in the flat [n * width]."""

    n: int
    width: int
    rows: Tensor
    places: Tensor

    def pad(self, x_TXX: Tensor) -> Tensor:
        """[T, ...] -> [n, width, ...], zeros in the padding: it adds nothing to any gradient."""
        rows = x_TXX.index_select(0, self.rows)
        if len(rows) < self.n * self.width:
            padded = x_TXX.new_zeros(self.n * self.width, *x_TXX.shape[1:])
            rows = padded.index_copy_(0, self.places, rows)
        return rows.view(self.n, self.width, *x_TXX.shape[1:])

    def unpad(self, x_NWXX: Tensor) -> Tensor:
        return x_NWXX.flatten(0, 1).index_select(0, self.places)


def _buckets(spans: list[tuple[int, int]]) -> Iterator[_Bucket]:
    """Spans of lengths within a factor of two share a rectangle: few calls, little padding."""
    waiting = sorted(spans, key=lambda span: -span[1])
    while waiting:
        width = waiting[0][1]
        count = sum(2 * length > width for _, length in waiting)
        chosen, waiting = waiting[:count], waiting[count:]
        rows = [torch.arange(start, start + length) for start, length in chosen]
        places = [torch.arange(i * width, i * width + span[1]) for i, span in enumerate(chosen)]
        yield _Bucket(count, width, torch.cat(rows), torch.cat(places))


class _PrefixAttention(torch.autograd.Function):
    """Causal attention within every span, and of responses over their prompt, merged.

    Two sets of keys merge exactly by their log-sum-exps (as in ring attention, arXiv 2310.01889);
    given the merged output and log-sum-exp, flash attention's backward over one set of keys yields
    that set's part of the gradient. q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq, D]. It computes in
    the dtype in which the machine multiplies fast, and keeps what was given for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        layout: _Layout = arguments[3]
        given, dtype = arguments[0].dtype, product_dtype(arguments[0])
        q, k, v = (x.to(dtype) for x in arguments[:3])
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
        for bucket in layout.buckets:
            part, part_lse = _flash(*_span_heads(bucket, q, k, v), 0.0, True)
            out[bucket.rows] = bucket.unpad(_join_span(part, bucket))
            lse[bucket.rows] = bucket.unpad(_join_span(part_lse[..., None], bucket))[..., 0]
        for prompt, start, end in layout.groups:
            if start == end:
                continue
            part, part_lse = _flash(*_prefix_heads(q[start:end], k[prompt:start], v[prompt:start]))
            part = _join_prefix(part, end - start)
            part_lse = _join_prefix(part_lse[..., None], end - start)[..., 0]
            merged = torch.logaddexp(lse[start:end], part_lse)
            own = out[start:end] * (lse[start:end] - merged).exp()[..., None]
            out[start:end] = own + part * (part_lse - merged).exp()[..., None]
            lse[start:end] = merged
        ctx.layout = layout
        out = out.to(given)
        ctx.save_for_backward(*arguments[:3], out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, lse = ctx.saved_tensors
        layout: _Layout = ctx.layout
        given, dtype = grad.dtype, product_dtype(grad)
        grad, q, k, v, out = (x.to(dtype) for x in (grad, *saved))
        d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
        kv_heads = k.shape[1]
        for bucket in layout.buckets:
            dtype = lse.dtype if bucket.width <= _SHORT_SPAN else q.dtype
            grads = _flash_backward(
                _split_span(bucket.pad(grad), kv_heads).to(dtype),
                *(heads.to(dtype) for heads in _span_heads(bucket, q, k, v)),
                _split_span(bucket.pad(out), kv_heads).to(dtype),
                _split_span(bucket.pad(lse)[..., None], kv_heads)[..., 0],
                0.0,
                True,
            )
            d_q[bucket.rows] = bucket.unpad(_join_span(grads[0], bucket)).to(q.dtype)
            for target, part in ((d_k, grads[1]), (d_v, grads[2])):
                own = _join_span(part.sum(1, keepdim=True), bucket)
                target[bucket.rows] = bucket.unpad(own).to(q.dtype)
        for prompt, start, end in layout.groups:
            if start == end:
                continue
            rows, keys = slice(start, end), slice(prompt, start)
            grads = _flash_backward(
                _split_prefix(grad[rows], kv_heads),
                *_prefix_heads(q[rows], k[keys], v[keys]),
                _split_prefix(out[rows], kv_heads),
                _split_prefix(lse[rows][..., None], kv_heads)[..., 0],
                0.0,
                False,
            )
            d_q[rows] += _join_prefix(grads[0], end - start)
            d_k[keys] += grads[1][0].transpose(0, 1)
            d_v[keys] += grads[2][0].transpose(0, 1)
        return d_q.to(given), d_k.to(given), d_v.to(given), None


# Within spans: (span, KV head) pairs are the batch, the query heads of a KV head its heads, so that
# K and V are seen by all of them without being repeated.
def _split_span(x_NWHD: Tensor, kv_heads: int) -> Tensor:
    n, width, heads, size = x_NWHD.shape
    split = x_NWHD.view(n, width, kv_heads, heads // kv_heads, size).permute(0, 2, 3, 1, 4)
    return split.reshape(n * kv_heads, heads // kv_heads, width, size)


def _join_span(x: Tensor, bucket: _Bucket) -> Tensor:
    joined = x.view(bucket.n, -1, *x.shape[1:]).permute(0, 3, 1, 2, 4)
    return joined.reshape(bucket.n, bucket.width, -1, x.shape[-1])


def _span_heads(bucket: _Bucket, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    kv_heads = k.shape[1]
    repeat = q.shape[1] // kv_heads
    keys = [_split_span(bucket.pad(x), kv_heads).expand(-1, repeat, -1, -1) for x in (k, v)]
    return [_split_span(bucket.pad(q), kv_heads), *keys]


# Over a prompt: all responses of the group, and all query heads of a KV head, are one long query.
def _split_prefix(x_RHD: Tensor, kv_heads: int) -> Tensor:
    rows, heads, size = x_RHD.shape
    split = x_RHD.view(rows, kv_heads, heads // kv_heads, size).permute(1, 2, 0, 3)
    return split.reshape(1, kv_heads, -1, size)


def _join_prefix(x: Tensor, rows: int) -> Tensor:
    split = x.view(x.shape[1], -1, rows, x.shape[-1]).permute(2, 0, 1, 3)
    return split.reshape(rows, -1, x.shape[-1])


def _prefix_heads(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    return [_split_prefix(q, k.shape[1]), k.transpose(0, 1)[None], v.transpose(0, 1)[None]]


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
