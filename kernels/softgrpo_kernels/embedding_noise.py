"""Gaussian noise on mixtures of embeddings, as a function of the noise keys alone."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_kernels.backends import backend_of
from softgrpo_kernels.cpu import embedding_noise as cpu
from softgrpo_kernels.limits import MAX_CANDIDATES
from softgrpo_kernels.noise import normal_noise

# Counts in the upper half of the stream's word, behind the draws of tokens and weights.
DRAW = MAX_CANDIDATES


def embedding_noise(
    size: int,
    seed: int | Tensor,
    position: Tensor,
    uid: int | Tensor,
    stream: int | Tensor,
    backend: str = "auto",
) -> Tensor:
    """Standard normal noise of every dimension of N embeddings, float32 [N, size]: a pure function
    of (seed, uid, position, dimension), the same bits on every back end.

    position: int64 [N], of the soft token in its sequence. seed, uid, stream: int64 [N], or a
    number. Counters as in `soft_token`, stream < 2^16; not looked at here. Triton has none: on a
    GPU it is plain PyTorch.
    """
    seed, position, uid, stream = (
        key.expand(position.shape) if isinstance(key, Tensor) else torch.full_like(position, key)
        for key in (seed, position, uid, stream)
    )
    if backend_of(backend, position.device) == "cpu":
        return cpu.embedding_noise(size, seed, position, uid, stream + (DRAW << 16))
    dimensions = torch.arange(size, device=position.device).expand(len(position), size)
    return normal_noise(dimensions, seed, position, uid, stream, DRAW)


def root_mean_square(table: Tensor) -> Tensor:
    """Of all numbers in an embedding table [V, H]: float64, the unit of the noise's scale."""
    rows = torch.linalg.vector_norm(table, dim=1, dtype=torch.float32)
    return (rows.double().square().sum() / table.numel()).sqrt()


def with_noise(mixtures: Tensor, noise: Tensor, deviation: Tensor) -> Tensor:
    """mixtures + deviation * noise in mixtures' dtype: float32 arithmetic, one rounding.

    mixtures: [N, H]; noise: float32 [N, H]; deviation: float32, a number or [N, 1].
    """
    return (mixtures.float() + deviation * noise).to(mixtures.dtype)
