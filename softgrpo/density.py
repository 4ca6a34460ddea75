"""Which log-density each recorded position has, and what the rollout itself says of it.

Soft positions of Gumbel noise have the density of the objective (`softgrpo_kernels.soft_density`).
Those of Dirichlet and Gaussian noise have the density of the recorded weights (below).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from softgrpo.batch import RolloutBatch
from softgrpo_kernels import gumbel_noise, soft_density

# What the released checkpoints were trained with (ALGORITHM.md section 2, `official`).
OFFICIAL_NOISE_CLIP = (-1.5, 3.0)
OFFICIAL_EPS = 1e-6

# Bounds of the rollout (softgrpo_kernels.reference.perturb) that are part of the densities.
MIN_SHAPE = 1e-30
MIN_WEIGHT = 1e-6


@dataclass(frozen=True)
class DensitySettings:
    """How positions were sampled and how they are scored; the same on both sides by construction.

    noise: gumbel, dirichlet or gaussian; noise_scale as in SoftParams. discrete_full: discrete
    positions are scored over the whole vocabulary instead of over their recorded candidates.
    discrete_listed: those candidates are on the record. max_soft_tokens: budget of the soft phase,
    None = unlimited.
    """

    objective: str = "exact"
    tau: float = 0.1
    noise: str = "gumbel"
    noise_scale: float = 1.0
    soft_temperature: float = 1.0
    discrete_temperature: float = 1.0
    discrete_full: bool = False
    discrete_listed: bool = True
    soft_enabled: bool = True
    max_soft_tokens: int | None = None

    @property
    def official(self) -> bool:
        return self.objective == "official"


@dataclass(frozen=True)
class PositionClasses:
    """Every response position is in exactly one of the first four classes. All bool [T].

    soft: the density of the recorded g'. candidates: log q of the token over its recorded
    candidates. full: log-softmax of the token over the vocabulary. forced: no choice, no loss.
    soft_phase: sampled with the soft parameters (soft positions and the token that ended them).
    listed: the candidates that it was drawn from are on the record.
    """

    soft: Tensor
    candidates: Tensor
    full: Tensor
    forced: Tensor
    soft_phase: Tensor
    listed: Tensor


def classify(batch: RolloutBatch, settings: DensitySettings) -> PositionClasses:
    """Sorts the positions of a batch into the classes of their density."""
    kind, forced = batch.soft.kind.bool(), batch.soft.forced.bool()
    index = batch.index_in_response
    # A position is of the soft phase when the one before it was soft: the phase never comes back.
    after_soft = torch.ones_like(kind)
    after_soft[1:] = kind[:-1]
    after_soft[index == 0] = True
    soft_phase = after_soft & ~forced & settings.soft_enabled
    if settings.max_soft_tokens is not None:
        soft_phase &= index < settings.max_soft_tokens
    full = ~soft_phase & settings.discrete_full
    if settings.official:
        full |= soft_phase & ~kind
    full &= ~forced
    # Only of Gumbel noise is the chance of the argmax known: the token that ended a soft phase of
    # another noise is scored by the density of its g', of which it is a function.
    soft = kind if settings.noise == "gumbel" else kind | soft_phase
    return PositionClasses(
        soft=soft,
        candidates=~soft & ~full & ~forced,
        full=full,
        forced=forced,
        soft_phase=soft_phase,
        listed=~forced & (soft_phase | settings.discrete_listed),
    )


def log_densities(
    logq_TK: Tensor,
    token_logp_T: Tensor,
    batch: RolloutBatch,
    classes: PositionClasses,
    settings: DensitySettings,
) -> Tensor:
    """Log-density l [T] of every position, differentiable; 0 where the token was forced.

    logq_TK: log q of the recorded candidates over their set (read at soft and candidate positions).
    token_logp_T: full-vocabulary log-probability of the token (read at full positions).
    """
    soft = _soft_density(
        logq_TK[classes.soft], batch.soft.gprime[classes.soft].to(logq_TK.dtype), settings
    )
    result = torch.where(classes.full, token_logp_T, 0.0).to(logq_TK.dtype)
    # The argmax of log p + c g is a sample from p^(1/c).
    scale = torch.where(classes.soft_phase, settings.noise_scale, 1.0)[classes.candidates]
    candidates = (logq_TK[classes.candidates] / scale[:, None]).log_softmax(-1)[:, 0]
    result = result.masked_scatter(classes.candidates, candidates)
    return result.masked_scatter(classes.soft, soft)


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


def rollout_logq(
    batch: RolloutBatch, classes: PositionClasses, settings: DensitySettings
) -> Tensor:
    """The rollout's own log p of each candidate [T, K], recovered as g' - noise; -inf where dead.

    Under `official` a candidate that top-p cut has p = 0, recorded as log(0 + 1e-6): it comes back
    as -inf, the others as log p. Dirichlet and Gaussian noise do not come off again: NaN, except
    for the token, whose log p is on the record.
    """
    soft = batch.soft
    owner = batch.sample_of_token
    noise = gumbel_noise(soft.ids, batch.seed, batch.position, batch.uid[owner], batch.stream)
    phase = classes.soft_phase[:, None]
    if settings.official:
        noise = torch.where(phase, noise.clamp(*OFFICIAL_NOISE_CLIP), noise)
    scale = torch.where(phase, settings.noise_scale, 1.0)
    live = soft.ids >= 0
    logp = torch.where(live, soft.gprime - scale * noise, -math.inf)
    if settings.noise != "gumbel":
        unknown = live & phase
        unknown[:, 0] = False
        first = torch.where(classes.soft_phase, batch.logprobs, logp[:, 0])
        logp = torch.cat([first[:, None], logp[:, 1:]], dim=-1)
        return logp.masked_fill(unknown, math.nan)
    if not settings.official:
        return logp
    # log(p + eps) -> log p. Under 2 eps, rounding of g' leaves nothing of p to recover.
    p = logp.exp() - OFFICIAL_EPS
    uncut = torch.where(p > OFFICIAL_EPS, p, 0.0).log()
    return torch.where(phase, uncut, logp)


def mismatch(logq_TK: Tensor, rollout_logq_TK: Tensor, classes: PositionClasses) -> Tensor:
    """|trainer's log q - rollout's log p| of every candidate that both kept, flat [M].

    Both are normalised over the rollout's kept set: under `official` the trainer's q runs over
    all K candidates, and that known difference is not a mismatch of the two models.
    """
    theirs = rollout_logq_TK[classes.listed]
    ours = logq_TK[classes.listed].detach().to(theirs.dtype)
    ours = ours.masked_fill(theirs == -math.inf, -math.inf).log_softmax(-1)
    known = theirs.isfinite()
    return (ours - theirs)[known].abs()
