"""Fused kernels for soft-thinking language models."""

from softgrpo_kernels.decoder import paged_attention, rms_norm, rope_store_kv, silu_mul

__all__ = ["paged_attention", "rms_norm", "rope_store_kv", "silu_mul"]
