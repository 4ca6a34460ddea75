"""From what a model computed at recorded positions to their log-densities, and back to its inputs.

Nothing here knows whose decoder it is: ours over packed tokens (`learner.policy`), or that of
transformers over padded ones (`softgrpo.trl`).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from softgrpo.algorithm.density import density_terms
from softgrpo.algorithm.positions import DensitySettings, Positions
from softgrpo_kernels import (
    embedding_noise,
    linear_candidate_logprob,
    linear_token_logprob,
    soft_embedding,
    soft_weights,
)
from softgrpo_kernels.embedding_noise import root_mean_square, with_noise
from softgrpo_kernels.linear_logprob import GradWeight
from softgrpo_kernels.methods.method import NoisyMixtures


class PositionLogProbs(NamedTuple):
    """terms, counts: [T, C], what has a ratio of its own at every response position, and how often
    each counts (`density_terms`). candidates: log q of the recorded candidates [T, K], detached.
    positions: what was scored, on the same device. entropy: float32 [T], see `score`."""

    terms: Tensor
    counts: Tensor
    candidates: Tensor
    positions: Positions
    entropy: Tensor | None = None

    @property
    def density(self) -> Tensor:
        """Log-density of every response position [T], differentiable."""
        return (self.counts * self.terms).sum(-1)


def mixtures(
    table_VH: Tensor, positions: Positions, tokens_M: Tensor, settings: DensitySettings
) -> Tensor:
    """What was fed after some soft positions [M, H], in the dtype of the table, detached.

    table_VH: input embeddings in the dtype of the computation. tokens_M: int64, the positions.
    """
    ids, gprime, kind = (
        part.index_select(0, tokens_M) for part in (positions.ids, positions.gprime, positions.kind)
    )
    weights = soft_weights(gprime, kind, settings.tau, settings.weight_floor)
    mixture_MH = soft_embedding(ids, weights, table_VH.detach())
    if positions.mixtures is not None:
        noise, deviation = positions.mixtures.noise, positions.mixtures.deviation
        rows = torch.searchsorted(positions.classes.rows.soft, tokens_M)
        mixture_MH = with_noise(mixture_MH, noise.index_select(0, rows), deviation)
    return mixture_MH


@torch.no_grad()
def with_mixtures(
    positions: Positions, master_VH: Tensor, dtype: torch.dtype, settings: DensitySettings
) -> Positions:
    """The positions with the noise of the soft ones drawn again, where the method adds noise to
    mixtures. master_VH, dtype: the table that the engine has is the master's in that dtype."""
    if not settings.method.adds_noise:
        return positions
    table_VH = master_VH.detach().to(dtype)
    rows = positions.classes.rows.soft
    position, uid = (x.index_select(0, rows) for x in (positions.position, positions.uid))
    unit = root_mean_square(table_VH)
    noisy = NoisyMixtures(
        ids=positions.ids.index_select(0, rows),
        noise=embedding_noise(table_VH.shape[1], positions.seed, position, uid, positions.stream),
        deviation=(unit * settings.noise_scale).float(),
        table=table_VH.float(),
    )
    return dataclasses.replace(positions, mixtures=noisy)


def score(
    hidden_TH: Tensor,
    head_VH: Tensor,
    positions: Positions,
    settings: DensitySettings,
    *,
    rewarded_T: Tensor | None = None,
    grad_weight: GradWeight = "dense",
    need_entropy: bool = False,
) -> PositionLogProbs:
    """Log-densities of the T positions from the hidden states that predict them.

    hidden_TH, head_VH: in one dtype. rewarded_T: as in `density_terms`. grad_weight: where the
    gradient of the head goes (`linear_candidate_logprob`). need_entropy: also the entropy of what
    each position was drawn from, in nats, detached: of its candidates or of the vocabulary; 0 where
    it was forced.
    """
    classes, rows = positions.classes, positions.classes.rows
    temperature_T = torch.where(
        classes.soft_phase, settings.soft_temperature, settings.discrete_temperature
    )
    logq = linear_candidate_logprob(
        hidden_TH.index_select(0, rows.listed),
        head_VH,
        positions.ids.index_select(0, rows.listed),
        temperature=temperature_T.index_select(0, rows.listed),
        grad_weight=grad_weight,
    )
    logq_TK = logq.new_full(positions.ids.shape, -torch.inf).index_copy(0, rows.listed, logq)
    token_logp_T = logq.new_zeros(len(positions.token))
    entropy_T = torch.zeros_like(token_logp_T) if need_entropy else None
    if len(rows.token):
        of_tokens = (
            hidden_TH.index_select(0, rows.token),
            head_VH,
            positions.token.index_select(0, rows.token),
        )
        temperature = temperature_T.index_select(0, rows.token)
        if entropy_T is None:
            token_logp = linear_token_logprob(
                *of_tokens, temperature=temperature, grad_weight=grad_weight
            )
        else:
            token_logp, entropy = linear_token_logprob(
                *of_tokens, temperature=temperature, grad_weight=grad_weight, need_entropy=True
            )
            entropy_T = entropy_T.index_copy(0, rows.token, entropy.detach())
        token_logp_T = token_logp_T.index_copy(0, rows.token, token_logp)
    if entropy_T is not None:
        entropy_T = entropy_T.index_copy(0, rows.listed, entropy_of(logq.detach()))
    terms_TC, counts_TC = density_terms(logq_TK, token_logp_T, positions, settings, rewarded_T)
    return PositionLogProbs(terms_TC, counts_TC, logq_TK.detach(), positions, entropy_T)


def entropy_of(logq_TK: Tensor) -> Tensor:
    """Entropy [T], in nats, of log-probabilities [T, K] with -inf in unused slots."""
    return -torch.where(logq_TK > -torch.inf, logq_TK.exp() * logq_TK, 0.0).sum(-1)
