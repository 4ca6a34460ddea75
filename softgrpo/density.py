"""Which log-density each recorded position has, and what the rollout itself says of it."""

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


@dataclass(frozen=True)
class DensitySettings:
    """How positions were sampled and how they are scored; the same on both sides by construction.

    discrete_full: discrete positions are scored over the whole vocabulary instead of over their
    recorded candidates. max_soft_tokens: budget of the soft phase, None = unlimited.
    """

    objective: str = "exact"
    tau: float = 0.1
    noise_scale: float = 1.0
    soft_temperature: float = 1.0
    discrete_temperature: float = 1.0
    discrete_full: bool = False
    soft_enabled: bool = True
    max_soft_tokens: int | None = None

    @property
    def official(self) -> bool:
        return self.objective == "official"


@dataclass(frozen=True)
class PositionClasses:
    """Every response position is in exactly one class. All bool [T].

    soft: the density of the recorded g'. candidates: log q of the token over its recorded
    candidates. full: log-softmax of the token over the vocabulary. forced: no choice, no loss.
    soft_phase: sampled with the soft parameters (soft positions and the token that ended them).
    """

    soft: Tensor
    candidates: Tensor
    full: Tensor
    forced: Tensor
    soft_phase: Tensor


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
    return PositionClasses(
        soft=kind,
        candidates=~kind & ~full & ~forced,
        full=full,
        forced=forced,
        soft_phase=soft_phase,
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
    soft = soft_density(
        logq_TK[classes.soft],
        batch.soft.gprime[classes.soft].to(logq_TK.dtype),
        objective=settings.objective,
        noise_scale=settings.noise_scale,
    )
    result = torch.where(classes.full, token_logp_T, 0.0).to(logq_TK.dtype)
    result = torch.where(classes.candidates, logq_TK[:, 0], result)
    return result.masked_scatter(classes.soft, soft)


def rollout_logq(
    batch: RolloutBatch, classes: PositionClasses, settings: DensitySettings
) -> Tensor:
    """The rollout's own log p of each candidate [T, K], recovered as g' - noise; -inf where dead.

    Under `official` a candidate that top-p cut has p = 0, recorded as log(0 + 1e-6): it comes back
    as -inf, the others as log p.
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
    if not settings.official:
        return logp
    # log(p + eps) -> log p. Under 2 eps, rounding of g' leaves nothing of p to recover.
    p = logp.exp() - OFFICIAL_EPS
    uncut = torch.where(p > OFFICIAL_EPS, p, 0.0).log()
    return torch.where(phase, uncut, logp)


def mismatch(logq_TK: Tensor, rollout_logq_TK: Tensor, classes: PositionClasses) -> Tensor:
    """|trainer's log q - rollout's log p| of every candidate that both kept, flat [M].

    Both are renormalised over the rollout's kept set: under `official` the trainer's q runs over
    all K candidates, and that known difference is not a mismatch of the two models.
    """
    rows = classes.soft | classes.candidates
    theirs = rollout_logq_TK[rows]
    ours = logq_TK[rows].detach().to(theirs.dtype)
    kept = theirs.isfinite()
    ours = ours.masked_fill(~kept, -math.inf).log_softmax(-1)
    return (ours - theirs)[kept].abs()
