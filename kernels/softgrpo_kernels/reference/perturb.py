"""From log-probabilities of candidates to g': every kind of noise, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_kernels.reference.noise import gumbel_noise, log_gamma_noise, normal_noise
from softgrpo_kernels.row_rules import DIRICHLET, GAUSSIAN, GUMBEL, MULTIPLEX, NONE, SOFT
from softgrpo_kernels.rows import RowParameters

Keys = tuple[Tensor, Tensor, Tensor, Tensor]

# Bounds that keep a logarithm finite.
MIN_SHAPE = 1e-30
MIN_WEIGHT = 1e-6


def perturb(logp: Tensor, ids: Tensor, used: Tensor, rows: RowParameters) -> Tensor:
    """g' of every slot; -inf where a slot is not (or no longer) used.

    Args:
        logp: [B, K], of the slots; ids: int [B, K]; used: bool [B, K].
    """
    soft = rows.mode == SOFT
    kind = torch.where(soft, rows.noise, GUMBEL)
    keys = (rows.seed, rows.position, rows.uid, rows.stream)
    gumbel = gumbel_noise(ids, *keys).to(logp.dtype)
    clamped = gumbel.clamp(rows.clamp_low[:, None], rows.clamp_high[:, None])
    gprime = logp + torch.where(soft[:, None], rows.noise_scale[:, None] * clamped, gumbel)
    gprime = torch.where((kind == NONE)[:, None], logp, gprime)
    for code, method in ((DIRICHLET, _dirichlet), (GAUSSIAN, _gaussian), (MULTIPLEX, _multiplex)):
        chosen = kind == code
        if bool(chosen.any()):
            other = method(logp, ids, used, rows.noise_scale[:, None], chosen, keys)
            gprime = torch.where(chosen[:, None], other, gprime)
    return gprime.masked_fill(~used, -torch.inf)


def _dirichlet(
    logp: Tensor, ids: Tensor, used: Tensor, scale: Tensor, chosen: Tensor, keys: Keys
) -> Tensor:
    """log x of x ~ Dirichlet(scale p): normalised Gamma numbers (2508.03440)."""
    shape = (scale * logp.double().exp().float()).clamp(min=MIN_SHAPE)
    log_gamma = log_gamma_noise(ids, torch.where(used, shape, 1.0), *keys).double()
    log_gamma = log_gamma.masked_fill(~used, -torch.inf)
    return (log_gamma - log_gamma.logsumexp(-1, keepdim=True)).to(logp.dtype)


def _gaussian(
    logp: Tensor, ids: Tensor, used: Tensor, scale: Tensor, chosen: Tensor, keys: Keys
) -> Tensor:
    """log max(p + scale N(0, 1), 1e-6)."""
    noisy = logp.double().exp() + (scale * normal_noise(ids, *keys)).double()
    return noisy.clamp(min=MIN_WEIGHT).log().to(logp.dtype)


def _multiplex(
    logp: Tensor, ids: Tensor, used: Tensor, scale: Tensor, chosen: Tensor, keys: Keys
) -> Tensor:
    """log(count / draws) of independent draws from p (2601.08808); -inf where nothing was drawn."""
    count = torch.zeros_like(logp, dtype=torch.float64)
    draws = torch.where(chosen & used.any(-1), scale[:, 0], 0.0)
    for draw in range(int(draws.max())):
        value = (logp + gumbel_noise(ids, *keys, draw).to(logp.dtype)).masked_fill(
            ~used, -torch.inf
        )
        tied = value == value.amax(-1, keepdim=True)
        lowest = torch.where(tied, ids, torch.iinfo(ids.dtype).max).argmin(-1, keepdim=True)
        count.scatter_add_(1, lowest, (draw < draws).to(count.dtype)[:, None])
    return torch.log(count / scale).to(logp.dtype)
