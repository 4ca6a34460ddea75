"""A drawn token, mixed with the distribution it was drawn from (Mixture of Inputs, arXiv
2505.14827; without its gate HRPO, arXiv 2505.18454)."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_kernels.methods.mean import Mean
from softgrpo_kernels.methods.method import Noise


class MixtureOfInputs(Mean):
    """g' = log w, w = H (p + beta onehot(token)) / (1 + beta) + (1 - H) onehot(token), beta the
    noise scale and H = entropy(p) / log n over the n candidates, 0 for one.

    Density: log q of the token, a semi-gradient as that of `Mean`.
    """

    noise = "mixture_of_inputs"
    code = 6
    draws_weights = True
    keeps_logp = False
    scale_rule = "noise_scale, beta of mixture_of_inputs, must be >= 0 and finite"

    def perturb(self, logp: Tensor, ids: Tensor, used: Tensor, noise: Noise) -> Tensor:
        # p of the best candidate is its share of the sum of all: its own logarithm, near 0, has
        # lost how far p is from 1, which is all that the entropy is made of.
        below = torch.where(used, (logp[:, :1] - logp).double(), 0.0)
        ratio = torch.where(used, torch.exp(-below), 0.0)
        ratio[:, 0] = 0.0
        others = ratio.sum(-1, keepdim=True)
        log_sum = torch.log(1.0 + others)
        entropy = log_sum + (ratio * below).sum(-1, keepdim=True) / (1.0 + others)
        n = used.sum(-1, keepdim=True).double()
        uncertainty = (entropy / n.clamp(min=2).log()).clamp(max=1.0)
        beta = noise.scale.double()
        share = uncertainty / (1.0 + beta)
        log_p = -below - log_sum
        token = share * (log_p.exp() + beta) + (1.0 - uncertainty)
        return torch.where(noise.drawn, token.log(), share.log() + log_p).to(logp.dtype)
