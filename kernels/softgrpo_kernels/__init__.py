"""Fused kernels for soft-thinking language models."""
