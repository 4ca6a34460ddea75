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
# Noise that the rollout clipped comes back as u = bound + the rounding of log q in another program,
# 1e-5 to 3e-4 in fp32 (of sums of |z| up to 50, and of the layers before them). A clipped candidate
# says only that its noise was beyond the bound, whatever the policy: it has no gradient.
# torch.clamp alone would give it the whole slope of the bound (-3.5, 0.95) or none, by that
# rounding. Of noise that was not clipped 1 in 10,000 lies this near and loses its gradient.
OFFICIAL_TOLERANCE = 1e-3


def soft_density(
    logq: Tensor, gprime: Tensor, *, objective: str = "exact", noise_scale: float = 1.0
) -> Tensor:
    """Log-density of the recorded g' given the current log q, differentiable in logq.

    With u_i = (g'_i - log q_i) / c, c the noise scale, over the n live slots (g' not -inf):

    - ``exact``: sum_i (-u_i - exp(-u_i)) - n log c, the density of g';
    - ``concrete``: lgamma(n) - sum_i u_i - n LSE_i(-u_i) - (n - 1) log c, the density of g' modulo
      a common shift, which the mixture does not see (Maddison et al. 2017, ExpConcrete);
    - ``official``: log(q + 1e-6) for log q, u clamped to [-1.5, 3] (no gradient outside, nor within
      1e-3 of a bound, where clipped noise comes back), mean over the slots with log q > -3, 0 where
      there is none.

    Args:
        logq: [N, K], log q over the row's candidates (dead slots: anything).
        gprime: [N, K], as recorded; dead slots -inf.
        noise_scale: c > 0.

    Returns:
        [N] in logq's dtype; 0 in rows without live slots; NaN, and so is the gradient, where a live
        slot holds a NaN.

    Raises:
        ValueError: an unknown objective, a noise scale that is no positive number, two shapes.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, not {objective!r}")
    if not 0.0 < noise_scale < math.inf:
        raise ValueError(f"noise_scale must be > 0 and finite, not {noise_scale}")
    if logq.shape != gprime.shape or logq.dim() == 0:
        raise ValueError(
            f"need logq and gprime of one shape [N, K], got {list(logq.shape)} and "
            f"{list(gprime.shape)}"
        )
    live = gprime != -torch.inf  # NaN is live: it must not vanish
    # Dead slots leave before any arithmetic: -inf - -inf would put NaN into the gradient.
    logq = torch.where(live, logq, 0.0)
    gprime = torch.where(live, gprime, 0.0).to(logq.dtype)
    if objective == "official":
        return _official(logq, gprime, live, noise_scale)
    log_scale = math.log(noise_scale)
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


def _official(logq: Tensor, gprime: Tensor, live: Tensor, noise_scale: float) -> Tensor:
    logq = torch.log(logq.exp() + OFFICIAL_EPS)
    u = (gprime - logq) / noise_scale
    low, high = OFFICIAL_CLAMP
    tolerance = OFFICIAL_TOLERANCE / noise_scale
    clipped = (u < low + tolerance) | (u > high - tolerance)
    # Comparisons are written so that a NaN is neither clipped nor left out of the mean.
    u = torch.where(clipped, u.detach().clamp(low, high), u)
    counted = live & (~(logq <= OFFICIAL_FLOOR) | gprime.isnan())
    terms = -u - torch.exp(-u) - math.log(noise_scale)
    return torch.where(counted, terms, 0.0).sum(-1) / counted.sum(-1).clamp(min=1)
