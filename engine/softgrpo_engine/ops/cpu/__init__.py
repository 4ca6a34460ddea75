"""The ops in C++, for the CPU: float32 and bfloat16. Imported where the extension is."""

from softgrpo_engine.ops.cpu.group_attention import group_attention, group_attention_backward
from softgrpo_engine.ops.cpu.paged_attention import paged_attention
from softgrpo_engine.ops.cpu.rms_norm import rms_norm, rms_norm_backward
from softgrpo_engine.ops.cpu.rope_store_kv import rope_store_kv
from softgrpo_engine.ops.cpu.rotate_heads import rotate_heads, rotate_heads_backward
from softgrpo_engine.ops.cpu.silu_mul import silu_mul, silu_mul_backward

__all__ = [
    "group_attention",
    "group_attention_backward",
    "paged_attention",
    "rms_norm",
    "rms_norm_backward",
    "rope_store_kv",
    "rotate_heads",
    "rotate_heads_backward",
    "silu_mul",
    "silu_mul_backward",
]
