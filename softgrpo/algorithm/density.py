"""The log-density of each recorded position, and what the rollout itself says of it.

Soft positions of Gumbel noise have the density of the objective (`softgrpo_kernels.soft_density`).
Those of Dirichlet and Gaussian noise have the density of the recorded weights (below).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softgrpo.algorithm.positions import DensitySettings, PositionClasses, Positions
from softgrpo_kernels import gumbel_noise, soft_density

# What the released checkpoints were trained with (ALGORITHM.md section 2, `official`).
OFFICIAL_NOISE_CLIP = (-1.5, 3.0)
OFFICIAL_EPS = 1e-6

# Bounds of the rollout (softgrpo_kernels.reference.perturb) that are part of the densities.
MIN_SHAPE = 1e-30
MIN_WEIGHT = 1e-6


def log_densities(
    logq_TK: Tensor,
    token_logp_T: Tensor,
    positions: Positions,
    settings: DensitySettings,
) -> Tensor:
    """Log-density l [T] of every position, differentiable; 0 where the token was forced.

    logq_TK: log q of the recorded candidates over their set (read at soft and candidate positions).
    token_logp_T: full-vocabulary log-probability of the token (read at full positions).
    """
    classes, rows = positions.classes, positions.classes.rows
    gprime = positions.soft.gprime.index_select(0, rows.soft).to(logq_TK.dtype)
    soft = _soft_density(logq_TK.index_select(0, rows.soft), gprime, settings)
    result = torch.where(classes.full, token_logp_T, 0.0).to(logq_TK.dtype)
    # The argmax of log p + c g is a sample from p^(1/c).
    scale = torch.where(classes.soft_phase, settings.noise_scale, 1.0)
    candidates = logq_TK.index_select(0, rows.candidates)
    candidates = candidates / scale.index_select(0, rows.candidates)[:, None]
    result = result.index_copy(0, rows.candidates, candidates.log_softmax(-1)[:, 0])
    return result.index_copy(0, rows.soft, soft)


def _soft_density(logq: Tensor, gprime: Tensor, settings: DensitySettings) -> Tensor:
    if settings.noise == "dirichlet":
        return dirichlet_density(logq, gprime, settings.noise_scale)
    if settings.noise == "gaussian":
        return gaussian_density(logq, gprime, settings.noise_scale)
    return soft_density(
        logq, gprime, objective=settings.objective, noise_scale=settings.noise_scale
    )


def dirichlet_density(logq: Tensor, gprime: Tensor, concentration: float) -> Tensor:
    """Log-density [N] of the weights x = exp(g') under Dirichlet(concentration * q).

    logq, gprime: [N, K], dead slots -inf in g'. With a = concentration * q, over the live slots:
    lgamma(concentration) - sum lgamma(a_i) + sum a_i log x_i, the density against prod dx_i / x_i:
    against dx the sum of log x_i, -1e4 where q is small, would leave nothing of the rest in fp32.
    """
    live = gprime > -math.inf
    shape = (concentration * torch.where(live, logq, 0.0).exp()).clamp(min=MIN_SHAPE)
    log_x = torch.where(live, gprime, 0.0)
    terms = torch.where(live, shape * log_x - torch.lgamma(shape), 0.0).sum(-1)
    return torch.where(live.any(-1), math.lgamma(concentration) + terms, 0.0)


def gaussian_density(logq: Tensor, gprime: Tensor, sigma: float) -> Tensor:
    """Log-density [N] of g' = log max(x, 1e-6) with x ~ Normal(q, sigma^2), independent slots.

    logq, gprime: [N, K], dead slots -inf in g'. A slot above the bound has the normal density of
    its x, one at the bound the probability of x <= 1e-6: a censored normal distribution.
    """
    live = gprime > -math.inf
    q = torch.where(live, logq, 0.0).exp()
    # The bound as every back end rounds its logarithm.
    censored = gprime < math.log(MIN_WEIGHT) + 1e-5
    u = (torch.where(live, gprime, 0.0).exp() - q) / sigma
    inside = -0.5 * u.square() - math.log(sigma * math.sqrt(2.0 * math.pi))
    below = torch.special.log_ndtr((MIN_WEIGHT - q) / sigma)
    return torch.where(live, torch.where(censored, below, inside), 0.0).sum(-1)


def rollout_logq(positions: Positions, settings: DensitySettings) -> Tensor:
    """The rollout's own log p of each candidate [T, K], recovered as g' - noise; -inf where dead.

    Under `official` a candidate that top-p cut has p = 0, recorded as log(0 + 1e-6): it comes back
    as -inf, the others as log p. Dirichlet and Gaussian noise do not come off again: NaN, except
    for the token, whose log p is on the record.
    """
    soft, classes = positions.soft, positions.classes
    keys = positions.seed, positions.position, positions.uid, positions.stream
    noise = gumbel_noise(soft.ids, *keys)
    phase = classes.soft_phase[:, None]
    if settings.official:
        noise = torch.where(phase, noise.clamp(*OFFICIAL_NOISE_CLIP), noise)
    scale = torch.where(phase, settings.noise_scale, 1.0)
    live = soft.ids >= 0
    logp = torch.where(live, soft.gprime - scale * noise, -math.inf)
    if settings.noise != "gumbel":
        unknown = live & phase
        unknown[:, 0] = False
        first = torch.where(classes.soft_phase, positions.logprobs, logp[:, 0])
        logp = torch.cat([first[:, None], logp[:, 1:]], dim=-1)
        return logp.masked_fill(unknown, math.nan)
    if not settings.official:
        return logp
    # log(p + eps) -> log p. Under 2 eps, rounding of g' leaves nothing of p to recover.
    p = logp.exp() - OFFICIAL_EPS
    uncut = torch.where(p > OFFICIAL_EPS, p, 0.0).log()
    return torch.where(phase, uncut, logp)


def mismatch(
    logq_TK: Tensor, rollout_logq_TK: Tensor, classes: PositionClasses
) -> tuple[Tensor, Tensor]:
    """|trainer's log q - rollout's log p| of every candidate [T, K], and which of them both kept.

    Both are normalised over the rollout's kept set: under `official` the trainer's q runs over
    all K candidates, and that known difference is not a mismatch of the two models.
    """
    ours = logq_TK.detach().to(rollout_logq_TK.dtype)
    ours = ours.masked_fill(rollout_logq_TK == -math.inf, -math.inf).log_softmax(-1)
    known = rollout_logq_TK.isfinite() & classes.listed[:, None]
    return (ours - rollout_logq_TK).abs(), known
