"""Gumbel noise, with the soft-label surrogate of LEPO (arXiv 2604.17892)."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_kernels.methods.gumbel import Gumbel
from softgrpo_kernels.methods.method import Rollout, live_slots
from softgrpo_kernels.soft_weights import weight_reach, weights_within


class Lepo(Gumbel):
    """sum_i w_i log q_i, w the weights of the mixture: no density, but what their gradient takes
    for one. At tau -> 0 it is `argmax`; else it has no mean of 0, and is biased.

    In the paper q runs over the vocabulary; here over the candidates, as in all other methods.
    """

    objective = "lepo"

    def density(self, logq: Tensor, gprime: Tensor, rollout: Rollout) -> Tensor:
        reach = weight_reach(rollout.tau, rollout.weight_floor)
        soft = torch.ones_like(gprime[..., 0], dtype=torch.uint8)
        weights = weights_within(gprime, soft, rollout.tau, reach).to(logq.dtype)
        logq, gprime, live = live_slots(logq, gprime)
        terms = torch.where(live, weights * logq, 0.0).sum(-1)
        return torch.where(gprime.isnan().any(-1), torch.nan, terms)
