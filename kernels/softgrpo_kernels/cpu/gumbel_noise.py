"""Gumbel noise in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_kernels.cpu import kernels
from softgrpo_kernels.tensors import int32


def gumbel_noise(
    ids: Tensor, seed: Tensor, position: Tensor, uid: Tensor, stream: Tensor
) -> Tensor:
    """See `softgrpo_kernels.noise.gumbel_noise`."""
    ids = int32(ids)
    keys = [key.expand(ids.shape[:-1]).contiguous() for key in (seed, position, uid, stream)]
    out = torch.empty(ids.shape, dtype=torch.float32)
    kernels().gumbel_noise(
        out.data_ptr(),
        ids.data_ptr(),
        *(key.data_ptr() for key in keys),
        keys[0].numel(),
        ids.shape[-1],
    )
    return out
