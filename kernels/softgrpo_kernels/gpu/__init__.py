"""The ops in Triton, for CUDA and ROCm. Imported when the first tensor of such a device arrives."""

from softgrpo_kernels.gpu.noise import gumbel_noise
from softgrpo_kernels.gpu.soft_embedding import soft_embedding
from softgrpo_kernels.gpu.soft_token import soft_token

__all__ = [
    "gumbel_noise",
    "soft_embedding",
    "soft_token",
]
