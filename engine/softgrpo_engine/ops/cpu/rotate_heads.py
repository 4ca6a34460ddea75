"""RoPE, and the keys and values of packed groups where attention reads them, in C++.

Meaning, shapes and dtypes: `softgrpo_engine.ops.gpu.rotate_heads`."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_engine.ops.extension import compiled


def rotate_heads(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    copy_starts: Tensor,
    copies: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k rotated, k and v copied to where attention reads them.

    Raises:
        ValueError: heads above the size that the kernels take, a place outside k and v.
    """
    rows, dim = qkv.shape[0], qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    q = qkv.new_empty(rows, num_heads, dim)
    k, v = (qkv.new_empty(len(copies), num_kv_heads, dim) for _ in range(2))
    _call(q, k, v, qkv.contiguous(), cos, sin, copy_starts, copies, backward=False)
    return q, k, v


def rotate_heads_backward(
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    copy_starts: Tensor,
    copies: Tensor,
) -> Tensor:
    """The gradient of qkv, [T, (Hq + 2 Hkv) D]."""
    d_q, d_k, d_v = d_q.contiguous(), d_k.contiguous(), d_v.contiguous()
    (rows, num_heads, dim), num_kv_heads = d_q.shape, d_k.shape[1]
    d_qkv = d_q.new_empty(rows, (num_heads + 2 * num_kv_heads) * dim)
    _call(d_q, d_k, d_v, d_qkv, cos, sin, copy_starts, copies, backward=True)
    return d_qkv


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    copy_starts: Tensor,
    copies: Tensor,
    *,
    backward: bool,
) -> None:
    cos, sin = cos.contiguous(), sin.contiguous()
    rows, num_heads, dim = q.shape
    compiled().rotate_heads(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        qkv.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        copy_starts.data_ptr(),
        copies.data_ptr(),
        rows,
        len(copies),
        num_heads,
        k.shape[1],
        dim,
        backward,
        q.dtype == torch.bfloat16,
    )
