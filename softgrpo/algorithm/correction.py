"""Importance weights for the difference between the engine that samples and the trainer."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo.config.sections import CorrectionConfig


def importance_weights(
    log_ratio_T: Tensor, sample_T: Tensor, num_samples: int, config: CorrectionConfig
) -> tuple[Tensor, Tensor]:
    """Weight of each token's policy gradient, and whether its ratio is beyond the bound. Both [T].

    log_ratio_T: float [T], log of the density under the trainer's weights before the update over
    that of the rollout; 0 where it is not known. Both are of the same weights, unless the rollout
    was drawn ahead: the clip then stays around the former, and this is the ratio of proximal to
    behaviour policy in the decoupled objective (arXiv 2110.00641, 2505.24298).
    sample_T: int64 [T], the sample of each token, of num_samples.

    The ratio is that of the token, or (level ``sequence``) the product over the tokens of its
    sample. ``truncate`` (TIS; Ionides 2008): min(ratio, max). ``mask`` (IcePop, arXiv 2510.18855):
    the ratio, 0 outside of [1/max, max]. ``none``: 1. Beyond the bound is what the mode changes;
    with ``none``, what ``mask`` would.
    """
    if config.level == "sequence":
        log_ratio_T = log_ratio_T.new_zeros(num_samples).index_add_(0, sample_T, log_ratio_T)[
            sample_T
        ]
    ratio_T = log_ratio_T.exp()
    above = ratio_T > config.max
    if config.mode == "truncate":
        return ratio_T.clamp(max=config.max), above
    beyond = above | (ratio_T < 1.0 / config.max)
    if config.mode == "mask":
        return ratio_T.masked_fill(beyond, 0.0), beyond
    return torch.ones_like(ratio_T), beyond
