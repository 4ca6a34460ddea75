"""Causal attention of the trainer over packed groups, in C++: float32 sums, one rounding.

A span (a prompt, or a response) sees itself up to each query, a response its group's prompt before.
Keys and values of a prompt are read where they are, by all of its responses. Backward, groups and
KV heads run side by side, the spans of a group in turn: the bits do not hang on the threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_engine.ops.extension import compiled


def group_attention(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor, groups: Tensor
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D)) v, and the log-sum-exp of the scores.

    q: [T, Hq, D]; k, v: [T, Hkv, D], float32 or bfloat16. spans: int64 [S, 4], (start, length,
    start of the prompt, its length) of each, 0 for that of a prompt itself; they cover all rows.
    groups: int64 [G + 1], the spans of group g are groups[g] .. groups[g + 1], its prompt's first.

    Returns out [T, Hq, D] and lse float32 [T, Hq].

    Raises:
        ValueError: spans or groups that do not fit.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2])
    _call((out, lse, q, k, v), (None,) * 4, spans, groups)
    return out, lse


def group_attention_backward(
    d_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    groups: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    d_q, d_k, d_v = (torch.empty_like(x) for x in (q, k, v))
    _call((out, lse, q, k, v), (d_out.contiguous(), d_q, d_k, d_v), spans, groups)
    return d_q, d_k, d_v


def _call(
    tensors: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...],
    spans: Tensor,
    groups: Tensor,
) -> None:
    q, k = tensors[2:4]
    tokens, num_heads, head_dim = q.shape
    all_of_them = (*tensors, *gradients, spans, groups)
    compiled().group_attention(
        [0 if tensor is None else tensor.data_ptr() for tensor in all_of_them],
        tokens,
        len(spans),
        len(groups) - 1,
        num_heads,
        k.shape[1],
        head_dim,
        head_dim**-0.5,
        gradients[0] is not None,
        q.dtype == torch.bfloat16,
    )
