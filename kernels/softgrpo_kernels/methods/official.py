"""What the released checkpoints of the paper were trained with: clipped Gumbel noise on the
logarithms of p + eps of all top_k candidates, and the surrogate of their code
(zz1358m/SofT-GRPO-master)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softgrpo_kernels.methods.gumbel import Gumbel
from softgrpo_kernels.methods.method import Rollout, live_slots

# Only candidates with log q above it count.
FLOOR = -3.0
# Noise that the rollout clipped comes back as u = bound + the rounding of log q in another program,
# 1e-5 to 3e-4 in fp32 (of sums of |z| up to 50, and of the layers before them). A clipped candidate
# says only that its noise was beyond the bound, whatever the policy: it has no gradient.
# torch.clamp alone would give it the whole slope of the bound (-3.5, 0.95) or none, by that
# rounding. Of noise that was not clipped 1 in 10,000 lies this near and loses its gradient.
TOLERANCE = 1e-3


class Official(Gumbel):
    """Density: mean of -u_i - exp(-u_i) - log c over the slots with log q > -3, 0 where there is
    none; log(q + 1e-6) for log q, u clamped to [-1.5, 3] (no gradient outside, nor within 1e-3 of a
    bound, where clipped noise comes back)."""

    objective = "official"
    ending = "vocabulary"
    noise_clip = (-1.5, 3.0)
    eps = 1e-6

    def density(self, logq: Tensor, gprime: Tensor, rollout: Rollout) -> Tensor:
        scale = rollout.noise_scale
        logq, gprime, live = live_slots(logq, gprime)
        logq = torch.log(logq.exp() + self.eps)
        u = (gprime - logq) / scale
        low, high = self.noise_clip
        tolerance = TOLERANCE / scale
        clipped = (u < low + tolerance) | (u > high - tolerance)
        # Comparisons are written so that a NaN is neither clipped nor left out of the mean.
        u = torch.where(clipped, u.detach().clamp(low, high), u)
        counted = live & (~(logq <= FLOOR) | gprime.isnan())
        terms = -u - torch.exp(-u) - math.log(scale)
        return torch.where(counted, terms, 0.0).sum(-1) / counted.sum(-1).clamp(min=1)

    def rollout_logp(self, gprime: Tensor, gumbel: Tensor, scale: float) -> Tensor:
        """As `Method`; a candidate that top-p cut has p = 0, recorded as log(0 + 1e-6): -inf."""
        p = (gprime - scale * gumbel.clamp(*self.noise_clip)).exp() - self.eps
        # Under 2 eps, rounding of g' leaves nothing of p to recover.
        return torch.where(p > self.eps, p, 0.0).log()
