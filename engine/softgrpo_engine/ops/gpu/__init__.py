"""The ops in Triton, for CUDA and ROCm. Imported when the first tensor of such a device arrives."""

from softgrpo_engine.ops.gpu.paged_attention import paged_attention
from softgrpo_engine.ops.gpu.rms_norm import rms_norm
from softgrpo_engine.ops.gpu.rope_store_kv import rope_store_kv
from softgrpo_engine.ops.gpu.silu_mul import silu_mul

__all__ = ["paged_attention", "rms_norm", "rope_store_kv", "silu_mul"]
