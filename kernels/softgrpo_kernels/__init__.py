"""Fused kernels for soft-thinking language models. Needs nothing but torch."""

from softgrpo_kernels.logprob import (
    linear_candidate_logprob,
    linear_soft_logprob,
    linear_token_logprob,
)
from softgrpo_kernels.reference.soft_embedding import soft_weights
from softgrpo_kernels.rows import RowParameters
from softgrpo_kernels.sampling import (
    gumbel_noise,
    soft_embedding,
    soft_token,
    soft_token_from_hidden,
    soft_token_of_rows,
)
from softgrpo_kernels.soft_density import soft_density
from softgrpo_kernels.step import SoftToken

__all__ = [
    "RowParameters",
    "SoftToken",
    "gumbel_noise",
    "linear_candidate_logprob",
    "linear_soft_logprob",
    "linear_token_logprob",
    "soft_density",
    "soft_embedding",
    "soft_token",
    "soft_token_from_hidden",
    "soft_token_of_rows",
    "soft_weights",
]
