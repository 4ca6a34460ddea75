"""Mixtures of embeddings in C++."""

from __future__ import annotations

from torch import Tensor

from softgrpo_kernels.cpu import kernels
from softgrpo_kernels.tensors import DTYPES, int32, unit_stride


def soft_embedding(ids: Tensor, weights: Tensor, embed: Tensor) -> Tensor:
    """See `softgrpo_kernels.reference.soft_embedding`."""
    table = unit_stride(embed)
    ids, weights = int32(ids), weights.float().contiguous()
    out = embed.new_empty((*ids.shape[:-1], embed.shape[1]))
    kernels().soft_embedding(
        out.data_ptr(),
        ids.data_ptr(),
        weights.data_ptr(),
        out.numel() // max(1, out.shape[-1]),  # not from ids, which may have no slots
        ids.shape[-1],
        table.data_ptr(),
        table.stride(0),
        table.shape[1],
        DTYPES[table.dtype],
    )
    return out
