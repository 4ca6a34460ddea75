"""Gumbel noise, scored modulo a common shift of g', which the mixture does not see (Maddison et al.
2017, ExpConcrete)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softgrpo_kernels.methods.gumbel import Gumbel
from softgrpo_kernels.methods.method import Rollout, live_slots


class Concrete(Gumbel):
    """Density: lgamma(n) - sum_i u_i - n LSE_i(-u_i) - (n - 1) log c, u = (g' - log q) / c."""

    objective = "concrete"

    def density(self, logq: Tensor, gprime: Tensor, rollout: Rollout) -> Tensor:
        scale = rollout.noise_scale
        logq, gprime, live = live_slots(logq, gprime)
        u = (gprime - logq) / scale
        n = live.sum(-1).to(logq.dtype)
        some = n > 0
        # A row without live slots would have the gradient of logsumexp over nothing.
        minus_u = torch.where(live, -u, -torch.inf).masked_fill(~some[..., None], 0.0)
        spread = torch.where(live, -u, 0.0).sum(-1) - n * minus_u.logsumexp(-1)
        density = torch.lgamma(n.clamp(min=1)) + spread - (n - 1) * math.log(scale)
        return torch.where(some, density, 0.0)
