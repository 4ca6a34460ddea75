"""Log-density of a recorded soft token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

OBJECTIVES = ("exact", "official", "concrete")

# `official`: what the released checkpoints of the paper were trained with.
OFFICIAL_EPS = 1e-6
OFFICIAL_CLAMP = (-1.5, 3.0)
OFFICIAL_FLOOR = -3.0


def soft_density(
    logq: Tensor, gprime: Tensor, *, objective: str = "exact", noise_scale: float = 1.0
) -> Tensor:
    """Log-density of the recorded g' given the current log q, differentiable in logq.

    With u_i = (g'_i - log q_i) / c, c the noise scale, over the n live slots (g' > -inf):

    - ``exact``: sum_i (-u_i - exp(-u_i)) - n log c, the density of g';
    - ``concrete``: lgamma(n) - sum_i u_i - n LSE_i(-u_i) - (n - 1) log c, the density of g' modulo
      a common shift, which the mixture does not see (Maddison et al. 2017, ExpConcrete);
    - ``official``: log(q + 1e-6) for log q, u clamped to [-1.5, 3] (no gradient outside), mean over
      the slots with log q > -3, 0 where there is none.

    Args:
        logq: [N, K], log q over the row's candidates (dead slots: anything).
        gprime: [N, K], as recorded; dead slots -inf.

    Returns:
        [N] in logq's dtype; 0 in rows without live slots.

    Raises:
        ValueError: an unknown objective.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, not {objective!r}")
    live = gprime > -torch.inf
    # Dead slots leave before any arithmetic: -inf - -inf would put NaN into the gradient.
    logq = torch.where(live, logq, 0.0)
    gprime = torch.where(live, gprime, 0.0).to(logq.dtype)
    log_scale = math.log(noise_scale)
    if objective == "official":
        logq = torch.log(logq.exp() + OFFICIAL_EPS)
        u = ((gprime - logq) / noise_scale).clamp(*OFFICIAL_CLAMP)
        counted = live & (logq > OFFICIAL_FLOOR)
        total = torch.where(counted, -u - torch.exp(-u) - log_scale, 0.0).sum(-1)
        return total / counted.sum(-1).clamp(min=1)
    u = (gprime - logq) / noise_scale
    n = live.sum(-1).to(logq.dtype)
    if objective == "exact":
        return torch.where(live, -u - torch.exp(-u), 0.0).sum(-1) - n * log_scale
    some = n > 0
    # A row without live slots would have the gradient of logsumexp over nothing.
    minus_u = torch.where(live, -u, -torch.inf).masked_fill(~some[..., None], 0.0)
    spread = torch.where(live, -u, 0.0).sum(-1) - n * minus_u.logsumexp(-1)
    density = torch.lgamma(n.clamp(min=1)) + spread - (n - 1) * log_scale
    return torch.where(some, density, 0.0)
