"""Gaussian noise on embeddings in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_kernels.cpu import kernels


def embedding_noise(
    size: int, seed: Tensor, position: Tensor, uid: Tensor, stream: Tensor
) -> Tensor:
    """Noise [N, size] of the keys [N]."""
    keys = [key.contiguous() for key in (seed, position, uid, stream)]
    out = torch.empty(len(position), size, dtype=torch.float32)
    kernels().embedding_noise(
        out.data_ptr(), *(key.data_ptr() for key in keys), len(position), size
    )
    return out
