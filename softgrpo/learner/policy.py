"""The trainable policy: recorded rollouts in, log-densities out."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softgrpo.algorithm.density import density_terms
from softgrpo.algorithm.positions import DensitySettings, Positions
from softgrpo.learner.packing import PackedInputs
from softgrpo.rollout.batch import RolloutBatch
from softgrpo_engine.model.decoder import Decoder
from softgrpo_engine.training.group_attention import GroupAttention
from softgrpo_engine.transfer import on_device
from softgrpo_kernels import (
    embedding_noise,
    linear_candidate_logprob,
    linear_token_logprob,
    soft_embedding,
    soft_weights,
)
from softgrpo_kernels.embedding_noise import root_mean_square, with_noise
from softgrpo_kernels.methods.method import NoisyMixtures


class PositionLogProbs(NamedTuple):
    """terms, counts: [T, C], what has a ratio of its own at every response position, and how often
    each counts (`density_terms`). candidates: log q of the recorded candidates [T, K], detached.
    positions: what was scored, on the same device."""

    terms: Tensor
    counts: Tensor
    candidates: Tensor
    positions: Positions

    @property
    def density(self) -> Tensor:
        """Log-density of every response position [T], differentiable."""
        return (self.counts * self.terms).sum(-1)


class Policy(nn.Module):
    """A decoder with master weights, run in a compute dtype. ``policy(batch)`` scores a rollout.

    The master weights stay in the decoder's dtype (float32); the layers cast them where they use
    them, so that the forward is the engine's and gradients accumulate in the master's precision.
    Of sharded weights a pass sees what FSDP has gathered, in the compute dtype.
    """

    def __init__(
        self, decoder: Decoder, settings: DensitySettings, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__()
        self.decoder = decoder.train()
        self.settings = settings
        self.dtype = dtype

    def forward(self, batch: RolloutBatch, rewarded_T: Tensor | None = None) -> PositionLogProbs:
        """Scores every response position of a batch under the current weights.

        rewarded_T: bool [T], whether the advantage is above 0, for methods whose gradient differs.

        The prompt of a group is computed once, then all its responses; no [T, V] tensor is made
        for soft positions, and none is kept for discrete ones. Everything that reads a weight
        happens in here, where FSDP has gathered them.
        """
        config = self.decoder.config
        device = self.decoder.embed_weight.device
        # Here a batch goes to the device; all that depends on its values was worked out before.
        positions = on_device(batch.positions(self.settings), device)
        packed = on_device(PackedInputs.of(batch), device)
        if self.settings.method.adds_noise:
            positions = dataclasses.replace(positions, mixtures=self._mixtures(positions))
        attention = GroupAttention(
            packed.prompt_lens,
            packed.response_lens,
            config.num_heads,
            config.num_kv_heads,
            device,
        )
        hidden_TH = self.decoder(self._embed(packed, positions), packed.positions, attention)
        return self._score(hidden_TH.index_select(0, packed.predictors), positions, rewarded_T)

    def _embed(self, packed: PackedInputs, positions: Positions) -> Tensor:
        """Input embeddings [T_in, H].

        Mixtures are detached: their gradient would be that of the sampled noise's path, not of the
        policy. Tokens are ordinary, trainable embeddings.
        """
        master_VH = self.decoder.embed_weight
        embeds = _embedding(packed.token_ids, master_VH).to(self.dtype)
        if not len(packed.mixed):
            return embeds
        ids, gprime, kind = (
            part.index_select(0, packed.mixed_from)
            for part in (positions.ids, positions.gprime, positions.kind)
        )
        weights = soft_weights(gprime, kind, self.settings.tau, self.settings.weight_floor)
        mixture = soft_embedding(ids, weights, master_VH.detach().to(self.dtype))
        if positions.mixtures is not None:
            noise, deviation = positions.mixtures.noise, positions.mixtures.deviation
            rows = torch.searchsorted(positions.classes.rows.soft, packed.mixed_from)
            mixture = with_noise(mixture, noise.index_select(0, rows), deviation)
        return embeds.index_copy(0, packed.mixed, mixture)

    @torch.no_grad()
    def _mixtures(self, positions: Positions) -> NoisyMixtures:
        """The noise of the soft positions, drawn again, on mixtures of the table that the engine
        has: the master's in the dtype of the computation."""
        table_VH = self.decoder.embed_weight.detach().to(self.dtype)
        rows = positions.classes.rows.soft
        position, uid = (x.index_select(0, rows) for x in (positions.position, positions.uid))
        unit = root_mean_square(table_VH)
        return NoisyMixtures(
            ids=positions.ids.index_select(0, rows),
            noise=embedding_noise(
                table_VH.shape[1], positions.seed, position, uid, positions.stream
            ),
            deviation=(unit * self.settings.noise_scale).float(),
            table=table_VH.float(),
        )

    def _score(
        self, hidden_TH: Tensor, positions: Positions, rewarded_T: Tensor | None
    ) -> PositionLogProbs:
        settings, classes, rows = self.settings, positions.classes, positions.classes.rows
        # The gradient of the head goes straight into the master's: no [V, H] temporary.
        master_VH = self.decoder.lm_head_weight
        head_VH = master_VH.detach().to(self.dtype)
        temperature_T = torch.where(
            classes.soft_phase, settings.soft_temperature, settings.discrete_temperature
        )
        logq = linear_candidate_logprob(
            hidden_TH.index_select(0, rows.listed),
            head_VH,
            positions.ids.index_select(0, rows.listed),
            temperature=temperature_T.index_select(0, rows.listed),
            grad_weight=master_VH,
        )
        logq_TK = logq.new_full(positions.ids.shape, -torch.inf).index_copy(0, rows.listed, logq)
        token_logp_T = logq.new_zeros(len(positions.token))
        if len(rows.token):
            token_logp = linear_token_logprob(
                hidden_TH.index_select(0, rows.token),
                head_VH,
                positions.token.index_select(0, rows.token),
                temperature=temperature_T.index_select(0, rows.token),
                grad_weight=master_VH,
            )
            token_logp_T = token_logp_T.index_copy(0, rows.token, token_logp)
        terms_TC, counts_TC = density_terms(logq_TK, token_logp_T, positions, settings, rewarded_T)
        return PositionLogProbs(terms_TC, counts_TC, logq_TK.detach(), positions)


def _embedding(ids: Tensor, master_VH: Tensor) -> Tensor:
    """Rows of the master's table. Its gradient holds these rows only and is added into .grad, which
    must then be dense: the optimizer and the norm of the gradient know no other."""

    def make_dense(_: Tensor) -> None:
        if master_VH.grad is None:
            master_VH.grad = torch.zeros_like(master_VH, dtype=master_VH.grad_dtype)

    rows = F.embedding(ids, master_VH, sparse=True)
    if rows.requires_grad:
        rows.register_hook(make_dense)  # then: until the backward pass it takes no memory
    return rows
