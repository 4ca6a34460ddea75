"""Gumbel noise on the log-probabilities, scored by the exact density of g' (SofT-GRPO, arXiv
2511.06411)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softgrpo_kernels.methods.method import Method, Noise, Rollout, live_slots
from softgrpo_kernels.noise import gumbel_noise


class Gumbel(Method):
    """g'_i = log p_i + c g_i, c the noise scale; its argmax is a draw from p^(1/c).

    Density: sum_i (-u_i - exp(-u_i)) - n log c over the n live slots, u_i = (g'_i - log q_i) / c.
    """

    noise = "gumbel"
    code = 0
    objective = "exact"

    def perturb(self, logp: Tensor, ids: Tensor, used: Tensor, noise: Noise) -> Tensor:
        gumbel = gumbel_noise(ids, *noise.keys).to(logp.dtype)
        return logp + noise.scale * gumbel.clamp(noise.clamp_low, noise.clamp_high)

    def density(self, logq: Tensor, gprime: Tensor, rollout: Rollout) -> Tensor:
        scale = rollout.noise_scale
        logq, gprime, live = live_slots(logq, gprime)
        u = (gprime - logq) / scale
        n = live.sum(-1).to(logq.dtype)
        return torch.where(live, -u - torch.exp(-u), 0.0).sum(-1) - n * math.log(scale)

    def ending_scale(self, noise_scale: float) -> float:
        return noise_scale  # the argmax of log p + c g is a draw from p^(1/c)
