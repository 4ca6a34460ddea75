"""Weights drawn from a Dirichlet distribution (arXiv 2508.03440)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from softgrpo_kernels.methods.method import Method, Noise, Rollout
from softgrpo_kernels.noise import log_gamma_noise

# Of a Gamma number, so that its logarithm is finite.
MIN_SHAPE = 1e-30


class Dirichlet(Method):
    """g' = log x, x ~ Dirichlet(c p), c the noise scale: normalised Gamma numbers.

    Density, with a = c q: lgamma(c) - sum lgamma(a_i) + sum a_i log x_i, against prod dx_i / x_i.
    Against dx the sum of log x_i, -1e4 where q is small, would leave nothing of the rest in fp32.
    """

    noise = "dirichlet"
    code = 2
    objective = "exact"
    draws_weights = True
    keeps_logp = False
    ending = "density"
    scale_rule = "noise_scale, Dirichlet's concentration, must be > 0"

    @classmethod
    def refuses_scale(cls, scale: Any) -> Any:
        return scale == 0.0

    def perturb(self, logp: Tensor, ids: Tensor, used: Tensor, noise: Noise) -> Tensor:
        shape = (noise.scale * logp.double().exp().float()).clamp(min=MIN_SHAPE)
        log_gamma = log_gamma_noise(ids, torch.where(used, shape, 1.0), *noise.keys).double()
        log_gamma = log_gamma.masked_fill(~used, -torch.inf)
        return (log_gamma - log_gamma.logsumexp(-1, keepdim=True)).to(logp.dtype)

    def density(self, logq: Tensor, gprime: Tensor, rollout: Rollout) -> Tensor:
        scale = rollout.noise_scale
        live = gprime > -math.inf
        shape = (scale * torch.where(live, logq, 0.0).exp()).clamp(min=MIN_SHAPE)
        log_x = torch.where(live, gprime, 0.0)
        terms = torch.where(live, shape * log_x - torch.lgamma(shape), 0.0).sum(-1)
        return torch.where(live.any(-1), math.lgamma(scale) + terms, 0.0)
