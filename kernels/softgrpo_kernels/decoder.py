"""Inference ops of a decoder in bf16 and fp32: C++ on the CPU, Triton on CUDA and ROCm.

Other dtypes and devices, and a CPU without the extension, take plain PyTorch.

They record no gradient; call them under ``torch.inference_mode()`` or ``torch.no_grad()``.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import overload

import torch
from torch import Tensor

from softgrpo_kernels.checks import check_device
from softgrpo_kernels.extension import cpu_extension
from softgrpo_kernels.reference import decoder as reference

_DTYPES = (torch.bfloat16, torch.float32)


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
    kernels = _kernels(q)
    if kernels is None:
        return reference.paged_attention(
            q, k_pages, v_pages, block_table, seq_lens, scale=scale, query_starts=query_starts
        )
    _check_ranks(
        q, q=(q, 3), k_pages=(k_pages, 4), v_pages=(v_pages, 4), block_table=(block_table, 2),
        seq_lens=(seq_lens, 1),
    )  # fmt: skip
    rows, num_heads, head_dim = q.shape
    num_pages, num_kv_heads, page_size, _ = k_pages.shape
    if k_pages.shape != v_pages.shape or k_pages.shape[3] != head_dim or num_heads % num_kv_heads:
        raise ValueError(
            f"q {list(q.shape)}, k_pages {list(k_pages.shape)}, v_pages {list(v_pages.shape)}: "
            "need [T, Hq, D] and two equal [P, Hkv, page_size, D] with Hq a multiple of Hkv"
        )
    _check_cache(q, k_pages, v_pages)
    sequences, table_width = block_table.shape
    starts = sequences + 1 if query_starts is None else query_starts.numel()
    if seq_lens.numel() != sequences or starts != sequences + 1:
        raise ValueError(
            f"block_table has {sequences} rows: need seq_lens [{sequences}] (has "
            f"{seq_lens.numel()}) and query_starts [{sequences + 1}] (has {starts})"
        )
    q, block_table, seq_lens = q.contiguous(), _int32(block_table), _int32(seq_lens)
    query_starts = None if query_starts is None else _int32(query_starts)
    if q.is_cuda:
        return kernels.paged_attention(
            q, k_pages, v_pages, block_table, seq_lens, scale=scale, query_starts=query_starts
        )
    out = torch.empty_like(q)
    kernels.paged_attention(
        out.data_ptr(),
        q.data_ptr(),
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        block_table.data_ptr(),
        seq_lens.data_ptr(),
        0 if query_starts is None else query_starts.data_ptr(),
        rows,
        sequences,
        table_width,
        num_pages,
        page_size,
        num_heads,
        num_kv_heads,
        head_dim,
        scale,
        q.dtype == torch.bfloat16,
    )
    return out


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square norm over the last dimension, after an addition where a residual is given.

    Args:
        x: [T, H]; weight: [H] in x's dtype; residual: [T, H] or None.

    Returns:
        ``norm(x)``, or ``(norm(s), s)`` with ``s = residual + x``. Rounded as Hugging Face's Llama:
        normalised in fp32, rounded to the dtype, then multiplied by the weight in the dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    kernels = _kernels(x)
    if kernels is None:
        return reference.rms_norm(x, weight, eps, residual)
    _check_ranks(x, x=(x, 2), weight=(weight, 1))
    rows, hidden = x.shape
    if weight.shape[0] != hidden or weight.dtype != x.dtype:
        raise ValueError(
            f"rms_norm: weight must be {x.dtype} [{hidden}], as x is, not "
            f"{weight.dtype} {list(weight.shape)}"
        )
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"rms_norm: eps must be >= 0 and finite, not {eps}")
    if residual is not None:
        _check_ranks(x, residual=(residual, 2))
        if residual.shape != x.shape or residual.dtype != x.dtype:
            raise ValueError("rms_norm: residual must have the shape and dtype of x")
    if x.is_cuda:
        return kernels.rms_norm(x, weight, eps, residual)
    x = x.contiguous()
    out = torch.empty_like(x)
    bf16 = x.dtype == torch.bfloat16
    if residual is None:
        kernels.rms_norm(
            out.data_ptr(), 0, x.data_ptr(), 0, weight.data_ptr(), rows, hidden, eps, bf16
        )
        return out
    residual = residual.contiguous()
    total = torch.empty_like(x)
    kernels.rms_norm(
        out.data_ptr(),
        total.data_ptr(),
        x.data_ptr(),
        residual.data_ptr(),
        weight.data_ptr(),
        rows,
        hidden,
        eps,
        bf16,
    )
    return out, total


def silu_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU activation: [T, 2I] -> ``silu(gate) * up`` [T, I], gate being the first half.

    Rounded as Hugging Face: silu in fp32, rounded to the dtype, then the product in the dtype.
    """
    kernels = _kernels(gate_up)
    if kernels is None:
        return reference.silu_mul(gate_up)
    _check_ranks(gate_up, gate_up=(gate_up, 2))
    rows, width = gate_up.shape
    if width % 2:
        raise ValueError(f"silu_mul: needs an even last dimension [T, 2I], got {width}")
    if gate_up.is_cuda:
        return kernels.silu_mul(gate_up)
    gate_up = gate_up.contiguous()
    out = gate_up.new_empty(rows, width // 2)
    bf16 = gate_up.dtype == torch.bfloat16
    kernels.silu_mul(out.data_ptr(), gate_up.data_ptr(), rows, width // 2, bf16)
    return out


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
    kernels = _kernels(qkv)
    if kernels is None:
        return reference.rope_store_kv(
            qkv, cos, sin, k_pages, v_pages, slot_mapping, num_heads, num_kv_heads
        )
    _check_ranks(
        qkv, qkv=(qkv, 2), k_pages=(k_pages, 4), v_pages=(v_pages, 4), cos=(cos, 2), sin=(sin, 2),
        slot_mapping=(slot_mapping, 1),
    )  # fmt: skip
    rows, width = qkv.shape
    num_pages, page_kv_heads, page_size, head_dim = k_pages.shape
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
    _check_cache(qkv, k_pages, v_pages)
    if cos.shape != (rows, head_dim) or sin.shape != cos.shape or slot_mapping.shape != (rows,):
        raise ValueError(f"rope_store_kv: needs cos, sin [{rows}, {head_dim}], slots [{rows}]")
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise ValueError(f"rope_store_kv: cos and sin must be float32, not {cos.dtype}")
    if slot_mapping.dtype != torch.int64:
        raise ValueError(f"rope_store_kv: slot_mapping must be int64, not {slot_mapping.dtype}")
    if qkv.is_cuda:
        return kernels.rope_store_kv(
            qkv, cos, sin, k_pages, v_pages, slot_mapping, num_heads, num_kv_heads
        )
    qkv, cos, sin, slot_mapping = (t.contiguous() for t in (qkv, cos, sin, slot_mapping))
    q_TQD = qkv.new_empty(rows, num_heads, head_dim)
    kernels.rope_store_kv(
        q_TQD.data_ptr(),
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        qkv.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        slot_mapping.data_ptr(),
        rows,
        num_heads,
        num_kv_heads,
        head_dim,
        num_pages,
        page_size,
        qkv.dtype == torch.bfloat16,
    )
    return q_TQD


def _kernels(x: Tensor) -> ModuleType | None:
    """The C++ or Triton kernels where they can take x."""
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("this op records no gradient; call it under torch.inference_mode()")
    if x.dtype not in _DTYPES:
        return None
    if x.is_cuda:
        from softgrpo_kernels import gpu

        return gpu
    return cpu_extension() if x.is_cpu else None


def _check_ranks(x: Tensor, /, **tensors: tuple[Tensor, int]) -> None:
    """Raises ValueError for a tensor of another rank, or on another device than x."""
    for name, (tensor, rank) in tensors.items():
        if tensor.dim() != rank:
            raise ValueError(f"{name} must have {rank} dimensions, not {list(tensor.shape)}")
        check_device(name, tensor, x.device)


def _check_cache(x: Tensor, k_pages: Tensor, v_pages: Tensor) -> None:
    if not (k_pages.dtype == v_pages.dtype == x.dtype):
        raise ValueError(f"k_pages and v_pages must be {x.dtype}, as the activations are")
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise ValueError("k_pages and v_pages must be contiguous [P, Hkv, page_size, D]")


def _int32(x: Tensor) -> Tensor:
    if x.dtype != torch.int32:
        raise ValueError(f"block_table, seq_lens and query_starts must be int32, not {x.dtype}")
    return x.contiguous()


def check_paging(
    x: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    cos: Tensor,
    sin: Tensor,
    slot_mapping: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_starts: Tensor | None,
    num_kv_heads: int,
) -> None:
    """Raises ValueError unless these are contiguous and fit the T rows of x and each other."""
    rows, head_dim = x.shape[0], k_pages.shape[-1]
    _check_cache(x, k_pages, v_pages)
    if k_pages.shape != v_pages.shape or k_pages.shape[-3] != num_kv_heads:
        raise ValueError(
            f"k_pages {list(k_pages.shape)} and v_pages {list(v_pages.shape)} must be equal and of "
            f"{num_kv_heads} KV heads"
        )
    sequences = block_table.shape[0]
    for name, tensor, dtype, shape in (
        ("cos", cos, torch.float32, (rows, head_dim)),
        ("sin", sin, torch.float32, (rows, head_dim)),
        ("slot_mapping", slot_mapping, torch.int64, (rows,)),
        ("block_table", block_table, torch.int32, tuple(block_table.shape)),
        ("seq_lens", seq_lens, torch.int32, (sequences,)),
        ("query_starts", query_starts, torch.int32, (sequences + 1,)),
    ):
        if tensor is None:
            continue
        if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {dtype} {list(shape)}, not {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
    if query_starts is None and sequences != rows:
        raise ValueError(f"{rows} rows for {sequences} sequences: give query_starts")
