"""The log-density of each recorded position, and what the rollout itself says of it.

The density of soft positions is that of their method (`softgrpo_kernels.methods`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from softgrpo.algorithm.positions import DensitySettings, PositionClasses, Positions
from softgrpo_kernels import gumbel_noise


def log_densities(
    logq_TK: Tensor,
    token_logp_T: Tensor,
    positions: Positions,
    settings: DensitySettings,
) -> Tensor:
    """Log-density l [T] of every position, differentiable; 0 where the token was forced.

    Arguments as in `density_terms`, of which it is the sum.
    """
    terms_TC, counts_TC = density_terms(logq_TK, token_logp_T, positions, settings)
    return (counts_TC * terms_TC).sum(-1)


def density_terms(
    logq_TK: Tensor,
    token_logp_T: Tensor,
    positions: Positions,
    settings: DensitySettings,
    rewarded_T: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What has a ratio of its own at every position [T, C], differentiable, and how often each of
    it counts [T, C]; l = sum(counts * terms). C is K where the method has a ratio of every slot,
    else 1. A position that is not soft has one term, in column 0.

    logq_TK: log q of the recorded candidates over their set (read at soft and candidate positions).
    token_logp_T: full-vocabulary log-probability of the token (read where `ClassRows.token` says).
    rewarded_T: whether the advantage is above 0, bool; it may decide the gradient, never the value.
    """
    classes, rows = positions.classes, positions.classes.rows
    gprime = positions.gprime.index_select(0, rows.soft).to(logq_TK.dtype)
    soft_logq = logq_TK.index_select(0, rows.soft)
    rollout = settings.rollout._replace(mixtures=positions.mixtures)
    if rewarded_T is not None:
        rollout = rollout._replace(rewarded=rewarded_T.index_select(0, rows.soft))
    if settings.method.normalised_over == "vocabulary":
        # The token stands in slot 0: its two probabilities differ by the mass of the candidates.
        mass = token_logp_T.index_select(0, rows.soft) - soft_logq[:, 0]
        soft_logq = soft_logq + mass[:, None]
    soft, soft_counts = settings.method.slot_terms(soft_logq, gprime, rollout)
    result = torch.where(classes.full, token_logp_T, 0.0).to(logq_TK.dtype)
    # A token that ended a soft phase was drawn from p^(1/c).
    ending_scale = settings.method.ending_scale(settings.noise_scale)
    scale = torch.where(classes.soft_phase, ending_scale, 1.0)
    candidates = logq_TK.index_select(0, rows.candidates)
    candidates = candidates / scale.index_select(0, rows.candidates)[:, None]
    result = result.index_copy(0, rows.candidates, candidates.log_softmax(-1)[:, 0])
    others = (0, soft.shape[1] - 1)
    terms_TC = F.pad(result[:, None], others).index_copy(0, rows.soft, soft)
    counts_TC = F.pad(torch.ones_like(result)[:, None], others)
    return terms_TC, counts_TC.index_copy(0, rows.soft, soft_counts)


def rollout_logq(positions: Positions, settings: DensitySettings) -> Tensor:
    """The rollout's own log p of each candidate [T, K], recovered from its record; -inf where dead.

    NaN where the method's noise does not come off again, except for the token, whose log p is on
    the record.
    """
    classes, method = positions.classes, settings.method
    keys = positions.seed, positions.position, positions.uid, positions.stream
    gumbel = gumbel_noise(positions.ids, *keys)
    if method.keeps_logp:
        soft = method.rollout_logp(positions.gprime, gumbel, settings.noise_scale)
    else:
        soft = torch.full_like(gumbel, math.nan)
        soft[:, 0] = positions.logprobs
    logp = torch.where(classes.soft_phase[:, None], soft, positions.gprime - gumbel)
    return torch.where(positions.ids >= 0, logp, -math.inf)


def behaviour_densities(
    rollout_logq_TK: Tensor, positions: Positions, settings: DensitySettings
) -> tuple[Tensor, Tensor]:
    """What the rollout itself drew every position with: log-density [T], and where the record
    gives it, bool [T]; elsewhere it means nothing. rollout_logq_TK: `rollout_logq`."""
    classes, method = positions.classes, settings.method
    density = log_densities(rollout_logq_TK, positions.full_logprobs, positions, settings)
    known = ~classes.forced
    if not method.records_density:
        known &= ~classes.soft
    if not method.keeps_logp:
        known &= ~classes.soft_phase
    return density, known


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
