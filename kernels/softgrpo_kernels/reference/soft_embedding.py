"""Mixtures of embeddings in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_kernels.tensors import wide_dtype


def soft_embedding(ids: Tensor, weights: Tensor, embed: Tensor) -> Tensor:
    """sum_j weights[.., j] embed[ids[.., j]], fp32 (fp64 for fp64) in slot order, rounded once."""
    wide = wide_dtype(embed.dtype)
    weights = weights.to(wide)
    total = torch.zeros((*ids.shape[:-1], embed.shape[1]), dtype=wide, device=embed.device)
    for slot in range(ids.shape[-1]):
        token, weight = ids[..., slot].long(), weights[..., slot].unsqueeze(-1)
        used = (token >= 0).unsqueeze(-1) & (weight != 0)
        term = embed[token.clamp(min=0)].to(wide) * weight
        total = torch.where(used, total + term, total)
    return total.to(embed.dtype)
