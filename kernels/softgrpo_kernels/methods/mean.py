"""The mixture of the probabilities themselves, beside a token that is drawn from them (the soft
positions of TARPO, arXiv 2606.05859)."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_kernels.methods.method import Method, Noise, Rollout


class Mean(Method):
    """g' = log p: with tau 1 the weights are p.

    Density: log q of the token. A semi-gradient: that the policy makes the weights too is left out,
    and the reward does depend on them.
    """

    noise = "mean"
    code = 7
    objective = "token"
    draws_token = True
    why_no_floor = "the token that it draws need not be the heaviest"

    def perturb(self, logp: Tensor, ids: Tensor, used: Tensor, noise: Noise) -> Tensor:
        return logp

    def density(self, logq: Tensor, gprime: Tensor, rollout: Rollout) -> Tensor:
        density = torch.where(gprime[..., 0] != -torch.inf, logq[..., 0], 0.0)
        return torch.where(gprime.isnan().any(-1), torch.nan, density)

    def rollout_logp(self, gprime: Tensor, gumbel: Tensor, scale: float) -> Tensor:
        return gprime
