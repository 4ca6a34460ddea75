"""Which kernels take a tensor, and what they ask of their arguments."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from softgrpo_engine.ops.extension import cpu_extension
from softgrpo_kernels.checks import check_device

_DTYPES = (torch.bfloat16, torch.float32)


def kernels_of(x: Tensor) -> ModuleType | None:
    """The C++ or Triton kernels where they can take x."""
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("this op records no gradient; call it under torch.inference_mode()")
    if x.dtype not in _DTYPES:
        return None
    if x.is_cuda:
        from softgrpo_engine.ops import gpu

        return gpu
    if not x.is_cpu or cpu_extension() is None:
        return None
    from softgrpo_engine.ops import cpu

    return cpu


def check_ranks(x: Tensor, /, **tensors: tuple[Tensor, int]) -> None:
    """Raises ValueError for a tensor of another rank, or on another device than x."""
    for name, (tensor, rank) in tensors.items():
        if tensor.dim() != rank:
            raise ValueError(f"{name} must have {rank} dimensions, not {list(tensor.shape)}")
        check_device(name, tensor, x.device)


def check_cache(x: Tensor, k_pages: Tensor, v_pages: Tensor) -> None:
    if not (k_pages.dtype == v_pages.dtype == x.dtype):
        raise ValueError(f"k_pages and v_pages must be {x.dtype}, as the activations are")
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise ValueError("k_pages and v_pages must be contiguous [P, Hkv, page_size, D]")


def int32(x: Tensor) -> Tensor:
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
    check_cache(x, k_pages, v_pages)
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
