"""Gumbel noise, scored by what a mixture with a weight floor shows of it (docs/concepts.md)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softgrpo_kernels.methods.gumbel import Gumbel
from softgrpo_kernels.methods.method import Rollout, live_slots
from softgrpo_kernels.soft_weights import counted_slots, weight_reach


class Censored(Gumbel):
    """The reader of a floored mixture sees which candidate k is the heaviest, how far those behind
    it are that count, d_i = g'_k - g'_i <= delta = tau ln(1 / floor), and of the others only that
    they are further. Density, with m counting ones besides k and a common shift of g' left out:

        log q_k + sum (log q_i + d_i) - (m + 1) log sum_j q_j exp(min(d_j, delta)) + lgamma(m + 1)

    Floor 1 is the token's score, floor 0 `concrete`. With a noise scale c: log q, d and delta over
    c, and - m log c.
    """

    objective = "censored"
    needs_floor = True

    def density(self, logq: Tensor, gprime: Tensor, rollout: Rollout) -> Tensor:
        scale, reach = rollout.noise_scale, weight_reach(rollout.tau, rollout.weight_floor)
        counted = counted_slots(gprime, reach)
        logq, gprime, live = live_slots(logq, gprime)
        counted &= live
        some = live.any(-1)
        behind = (gprime[..., :1] - gprime) / scale
        logq = logq / scale
        clipped = logq + behind.clamp(max=reach / scale)
        # A row without live slots would have the gradient of logsumexp over nothing.
        clipped = torch.where(live, clipped, -torch.inf).masked_fill(~some[..., None], 0.0)
        count = counted.sum(-1).to(logq.dtype)  # m + 1
        shown = torch.where(counted, logq + behind, 0.0).sum(-1) - count * clipped.logsumexp(-1)
        density = torch.lgamma(count.clamp(min=1)) + shown - (count - 1) * math.log(scale)
        return torch.where(some, density, 0.0)
