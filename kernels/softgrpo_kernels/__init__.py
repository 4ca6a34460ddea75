"""Fused kernels for soft-thinking language models. Needs nothing but torch."""

from typing import TYPE_CHECKING, NoReturn

from softgrpo_kernels.embedding_noise import embedding_noise
from softgrpo_kernels.gumbel_noise import gumbel_noise
from softgrpo_kernels.linear_logprob import (
    linear_candidate_logprob,
    linear_soft_logprob,
    linear_token_logprob,
)
from softgrpo_kernels.row_parameters import RowParameters
from softgrpo_kernels.soft_density import soft_density
from softgrpo_kernels.soft_embedding import soft_embedding
from softgrpo_kernels.soft_token import soft_token, soft_token_of_rows
from softgrpo_kernels.soft_token_tensors import SoftToken
from softgrpo_kernels.soft_weights import soft_weights

__all__ = [
    "RowParameters",
    "SoftToken",
    "embedding_noise",
    "gumbel_noise",
    "linear_candidate_logprob",
    "linear_soft_logprob",
    "linear_token_logprob",
    "soft_density",
    "soft_embedding",
    "soft_token",
    "soft_token_of_rows",
    "soft_weights",
]

# Where names went that were here once.
_MOVED = {
    "soft_token_from_hidden": "soft_token(None, embed, hidden=..., lm_head=...)",
    "paged_attention": "softgrpo_engine.ops.paged_attention.paged_attention",
    "rms_norm": "softgrpo_engine.ops.rms_norm.rms_norm",
    "rope_store_kv": "softgrpo_engine.ops.rope_store_kv.rope_store_kv",
    "silu_mul": "softgrpo_engine.ops.silu_mul.silu_mul",
    **{
        name: f"softgrpo_engine.ops.packed_linear.{name}"
        for name in ("PackedWeight", "matrix_unit", "pack_weight", "packed_linear")
    },
    **{
        name: f"softgrpo_engine.ops.decoder_layers.{name}"
        for name in ("DecoderLayers", "LayerWeights")
    },
}

if not TYPE_CHECKING:  # to which every name would exist

    def __getattr__(name: str) -> NoReturn:
        if name in _MOVED:  # an AttributeError would lose its message in `from ... import`
            raise ImportError(f"softgrpo_kernels.{name} is now {_MOVED[name]}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
