"""The mean of independent draws, each weighted by its probability (Multiplex Thinking, arXiv
2601.08808)."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_kernels.methods.multiplex import Multiplex, PerSlot, SlotMean
from softgrpo_kernels.noise import portable_log

# The low bits of g' that hold count - 1.
COUNT_BITS = 6
# Of |g'|: near 0 the word has no room for them.
MIN_LOG_WEIGHT = 2.0**-20


class MultiplexWeighted(Multiplex):
    """As `Multiplex`, with weights proportional to count x p.

    g' = log(count x p), rounded so that the six low bits of its fp32 word hold count - 1: the
    record gives weights and counts back. That changes g' by 2^-18 of itself, or by 2^-20 near 0, at
    most.
    """

    noise = "multiplex_weighted"
    code = 5

    def log_weights(self, count: Tensor, logp: Tensor, draws: Tensor) -> Tensor:
        value = logp + portable_log(count)
        value = value.masked_fill(value.abs() < MIN_LOG_WEIGHT, MIN_LOG_WEIGHT)
        low, size = count.int() - 1, 1 << COUNT_BITS
        # The nearest word that ends in these bits; a larger word is a larger |g'|.
        word = (value.view(torch.int32) - low + size // 2) & -size
        return (word | low).view(torch.float32)

    def counts(self, gprime: Tensor, draws: float) -> Tensor:
        word = gprime.float().contiguous().view(torch.int32)
        counts = ((word & ((1 << COUNT_BITS) - 1)) + 1).to(gprime.dtype)
        counts = counts.masked_fill(gprime == -torch.inf, 0.0)
        return torch.where(gprime.isnan(), gprime, counts)  # it must not vanish


class WeightedSlotMean(MultiplexWeighted, SlotMean):
    """See `SlotMean`."""


class WeightedPerSlot(MultiplexWeighted, PerSlot):
    """See `PerSlot`."""
