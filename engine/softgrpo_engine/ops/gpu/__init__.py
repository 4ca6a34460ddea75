"""The ops in Triton, for CUDA and ROCm. Imported when the first tensor of such a device arrives."""

from softgrpo_engine.ops.gpu.paged_attention import paged_attention
from softgrpo_engine.ops.gpu.rms_norm import rms_norm, rms_norm_backward
from softgrpo_engine.ops.gpu.rope_store_kv import rope_store_kv
from softgrpo_engine.ops.gpu.rotate_heads import rotate_heads, rotate_heads_backward
from softgrpo_engine.ops.gpu.silu_mul import silu_mul, silu_mul_backward

__all__ = [
    "paged_attention",
    "rms_norm",
    "rms_norm_backward",
    "rope_store_kv",
    "rotate_heads",
    "rotate_heads_backward",
    "silu_mul",
    "silu_mul_backward",
]
