"""Gaussian noise on the probabilities (the comparison of figure 3 in arXiv 2511.06411)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softgrpo_kernels.methods.method import Method, Noise, Rollout
from softgrpo_kernels.noise import normal_noise

# Of a weight, so that its logarithm is finite.
MIN_WEIGHT = 1e-6


class Gaussian(Method):
    """g' = log max(p + c N(0, 1), 1e-6), c the noise scale.

    Density: independent censored normal distributions. A slot above the bound has the normal
    density of its x, one at the bound the probability of x <= 1e-6.
    """

    noise = "gaussian"
    code = 3
    objective = "exact"
    draws_weights = True
    keeps_logp = False
    ending = "density"

    def perturb(self, logp: Tensor, ids: Tensor, used: Tensor, noise: Noise) -> Tensor:
        noisy = logp.double().exp() + (noise.scale * normal_noise(ids, *noise.keys)).double()
        return noisy.clamp(min=MIN_WEIGHT).log().to(logp.dtype)

    def density(self, logq: Tensor, gprime: Tensor, rollout: Rollout) -> Tensor:
        scale = rollout.noise_scale
        live = gprime > -math.inf
        q = torch.where(live, logq, 0.0).exp()
        # The bound as every back end rounds its logarithm.
        censored = gprime < math.log(MIN_WEIGHT) + 1e-5
        u = (torch.where(live, gprime, 0.0).exp() - q) / scale
        inside = -0.5 * u.square() - math.log(scale * math.sqrt(2.0 * math.pi))
        below = torch.special.log_ndtr((MIN_WEIGHT - q) / scale)
        return torch.where(live, torch.where(censored, below, inside), 0.0).sum(-1)
