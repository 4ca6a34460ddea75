"""The trainable policy: recorded rollouts in, log-densities out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softgrpo.batch import RolloutBatch
from softgrpo.density import DensitySettings, PositionClasses, classify, log_densities
from softgrpo_engine.group_attention import GroupAttention
from softgrpo_engine.model import Decoder
from softgrpo_kernels import (
    linear_candidate_logprob,
    linear_token_logprob,
    soft_embedding,
    soft_weights,
)


class PositionLogProbs(NamedTuple):
    """density: log-density of every response position [T], differentiable. candidates: log q of
    the recorded candidates [T, K], detached. classes: which density each position has."""

    density: Tensor
    candidates: Tensor
    classes: PositionClasses


class Policy(nn.Module):
    """A decoder with master weights, run in a compute dtype. ``policy(batch)`` scores a rollout.

    The master weights stay in the decoder's dtype (float32); the layers cast them where they use
    them, so that the forward is the engine's and gradients accumulate in the master's precision.
    """

    def __init__(
        self, decoder: Decoder, settings: DensitySettings, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__()
        self.decoder = decoder.train()
        self.settings = settings
        self.dtype = dtype

    def forward(self, batch: RolloutBatch) -> PositionLogProbs:
        """Scores every response position of a batch under the current weights.

        The prompt of a group is computed once, then all its responses; no [T, V] tensor is made
        for soft positions, and none is kept for discrete ones. Everything that reads a weight
        happens in here, where FSDP has gathered them.
        """
        settings = self.settings
        classes = classify(batch, settings)
        packed = _PackedInputs.from_batch(batch)
        inputs_TH = packed.embed(batch, self.decoder.embed_weight, self.dtype, settings.tau)
        config = self.decoder.config
        attention = GroupAttention(
            packed.prompt_lens,
            packed.response_lens,
            config.num_heads,
            config.num_kv_heads,
            inputs_TH.device,
        )
        hidden_TH = self.decoder(inputs_TH, packed.positions, attention)
        hidden_TH = hidden_TH.index_select(0, packed.predictors)
        return self._score(hidden_TH, batch, classes)

    def _score(
        self, hidden_TH: Tensor, batch: RolloutBatch, classes: PositionClasses
    ) -> PositionLogProbs:
        settings = self.settings
        # The gradient of the head goes straight into the master's: no [V, H] temporary.
        master_VH = self.decoder.lm_head_weight
        head_VH = master_VH.detach().to(self.dtype)
        temperature_T = torch.where(
            classes.soft_phase, settings.soft_temperature, settings.discrete_temperature
        )
        listed = classes.listed
        logq = linear_candidate_logprob(
            hidden_TH[listed],
            head_VH,
            batch.soft.ids[listed],
            temperature=temperature_T[listed],
            grad_weight=master_VH,
        )
        logq_TK = logq.new_full(batch.soft.ids.shape, -torch.inf)
        logq_TK = logq_TK.masked_scatter(listed[:, None].expand_as(logq_TK), logq)
        token_logp_T = logq.new_zeros(len(batch.soft.token))
        if bool(classes.full.any()):
            token_logp = linear_token_logprob(
                hidden_TH[classes.full],
                head_VH,
                batch.soft.token[classes.full],
                temperature=temperature_T[classes.full],
                grad_weight=master_VH,
            )
            token_logp_T = token_logp_T.masked_scatter(classes.full, token_logp)
        density = log_densities(logq_TK, token_logp_T, batch, classes, settings)
        return PositionLogProbs(density, logq_TK.detach(), classes)


@dataclass(frozen=True)
class _PackedInputs:
    """Layout of a pass: ``[prompt | response | response | ...]`` for every group.

    The last token of a response predicts nothing and is not fed. positions: int64 [T_in].
    is_prompt: bool [T_in]. source: int64 [T_in], the row of prompt_ids (prompt positions) or of the
    response tokens. predictors: int64 [T], the packed row that predicts each response token; the
    first tokens of a group share the last row of their prompt.
    """

    prompt_lens: list[int]
    response_lens: list[list[int]]
    positions: Tensor
    is_prompt: Tensor
    source: Tensor
    predictors: Tensor

    @classmethod
    def from_batch(cls, batch: RolloutBatch) -> _PackedInputs:
        prompt_lens = batch.prompt_lens.tolist()
        group, lens = batch.group.tolist(), batch.response_lens.tolist()
        fed: list[list[int]] = [[] for _ in prompt_lens]
        positions, is_prompt, source, predictors = [], [], [], []
        row = prompt_start = token_start = sample = 0
        for g, prompt_len in enumerate(prompt_lens):
            positions.append(torch.arange(prompt_len))
            is_prompt.append(torch.ones(prompt_len, dtype=torch.bool))
            source.append(torch.arange(prompt_start, prompt_start + prompt_len))
            prompt_start += prompt_len
            row += prompt_len
            last_prompt_row = row - 1
            while sample < len(group) and group[sample] == g:
                length = lens[sample]
                inputs = max(length - 1, 0)
                fed[g].append(inputs)
                positions.append(torch.arange(prompt_len, prompt_len + inputs))
                is_prompt.append(torch.zeros(inputs, dtype=torch.bool))
                source.append(torch.arange(token_start, token_start + inputs))
                if length:
                    predictors.append(torch.tensor([last_prompt_row]))
                predictors.append(torch.arange(row, row + inputs))
                row += inputs
                token_start += length
                sample += 1
        return cls(
            prompt_lens,
            fed,
            torch.cat(positions),
            torch.cat(is_prompt),
            torch.cat(source),
            torch.cat(predictors),
        )

    def embed(
        self, batch: RolloutBatch, embed_VH: Tensor, dtype: torch.dtype, tau: float
    ) -> Tensor:
        """Input embeddings [T_in, H] in dtype.

        Mixtures are detached: their gradient would be that of the sampled noise's path, not of the
        policy. Tokens are ordinary, trainable embeddings.
        """
        response = ~self.is_prompt
        ids = torch.empty(len(self.source), dtype=torch.int64)
        ids[self.is_prompt] = batch.prompt_ids.long()[self.source[self.is_prompt]]
        ids[response] = batch.soft.token.long()[self.source[response]]
        embeds = _embedding(ids, embed_VH).to(dtype)
        soft = torch.zeros_like(self.is_prompt)
        soft[response] = batch.soft.kind.bool()[self.source[response]]
        if not bool(soft.any()):
            return embeds
        rows = self.source[soft]
        record = batch.soft
        mixture = soft_embedding(
            record.ids[rows],
            soft_weights(record.gprime[rows], record.kind[rows], tau),
            embed_VH.detach().to(dtype),
        )
        return embeds.index_copy(0, soft.nonzero().squeeze(1), mixture)


def _embedding(ids: Tensor, master_VH: Tensor) -> Tensor:
    """Rows of the master's table. Its gradient holds these rows only and is added into .grad, which
    must then be dense: the optimizer and the norm of the gradient know no other."""
    if master_VH.requires_grad and torch.is_grad_enabled() and master_VH.grad is None:
        master_VH.grad = torch.zeros_like(master_VH)
    return F.embedding(ids, master_VH, sparse=True)
