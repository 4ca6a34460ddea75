"""The ops in Triton, for CUDA and ROCm. Imported when the first tensor of such a device arrives."""

from softgrpo_kernels.gpu.soft_embedding import soft_embedding

__all__ = ["soft_embedding"]
