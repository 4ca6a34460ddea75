"""The same ops in plain PyTorch: the meaning of every kernel, on any device, up to float64."""

from softgrpo_kernels.noise import gumbel_noise, philox4x32
from softgrpo_kernels.reference.soft_embedding import soft_embedding, soft_weights
from softgrpo_kernels.reference.soft_token import soft_token

__all__ = [
    "gumbel_noise",
    "philox4x32",
    "soft_embedding",
    "soft_token",
    "soft_weights",
]
