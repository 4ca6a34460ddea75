"""Records scored by a causal model of transformers, over sequences padded as TRL pads them."""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softgrpo.algorithm.positions import DensitySettings, Positions
from softgrpo.learner.scoring import mixtures, score, with_mixtures
from softgrpo.rollout.batch import RolloutBatch


@dataclass(frozen=True)
class PaddedRecord:
    """B responses of at most C tokens behind prompts padded on the left to P: rows of P + C cells.

    size: (B, C). positions: of their T tokens, one response behind the other. attention_mask,
    position_ids: int64 [B, P + C]. predictors, fed: int64 [T], the cells (row * (P + C) + column)
    that predict each token, and where it is read. cells: int64 [T], its place in a table [B, C].
    mixed: int64 [M], the tokens after which a mixture was fed. rewarded: bool [T], as in
    `density_terms`.
    """

    size: tuple[int, int]
    positions: Positions
    attention_mask: Tensor
    position_ids: Tensor
    predictors: Tensor
    fed: Tensor
    cells: Tensor
    mixed: Tensor
    rewarded: Tensor | None

    @staticmethod
    def of(
        batch: RolloutBatch,
        prompt_width: int,
        response_width: int,
        settings: DensitySettings,
        rewarded_B: Tensor | None = None,
    ) -> PaddedRecord:
        """Of a batch with a prompt a sample, on the host as it is. rewarded_B: bool [B]."""
        prompts, responses = batch.prompt_lens.long(), batch.response_lens.long()
        width = prompt_width + response_width
        column = torch.arange(width)
        first, end = prompt_width - prompts[:, None], prompt_width + responses[:, None]
        sample, index = batch.sample_of_token, batch.index_in_response
        fed = sample * width + prompt_width + index
        return PaddedRecord(
            size=(len(responses), response_width),
            positions=batch.positions(settings),
            attention_mask=((column >= first) & (column < end)).long(),
            position_ids=(column - first).clamp(min=0),
            predictors=fed - 1,
            fed=fed,
            cells=sample * response_width + index,
            mixed=batch.soft.kind.nonzero()[:, 0],
            rewarded=None if rewarded_B is None else rewarded_B[sample],
        )


def add_soft_forward(model: nn.Module, settings: DensitySettings, dtype: torch.dtype) -> None:
    """Lets a causal language model score records: ``model(input_ids, record=PaddedRecord)`` gives
    (log-density, entropy) [B, C], 0 where no token is. Without a record its forward is as before.

    dtype: of the engine's tables, which mixtures are made of. Everything reads the weights inside
    the model's own forward, so that wrappers of it (DDP, peft) see a pass like any other.
    """
    forward: Any = model.forward

    @functools.wraps(type(model).forward)  # `generate` looks at its signature
    def soft_forward(
        self: Any, *args: Any, record: PaddedRecord | None = None, **inputs: Any
    ) -> Any:
        if record is None:
            return forward(*args, **inputs)
        return _scores(self, inputs["input_ids"], record, settings, dtype)

    model.forward = types.MethodType(soft_forward, model)


def _scores(
    model: Any,
    input_ids: Tensor,
    record: PaddedRecord,
    settings: DensitySettings,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    embedding = model.get_input_embeddings()
    positions = with_mixtures(record.positions, embedding.weight, dtype, settings)
    embeds = embedding(input_ids)
    if len(record.mixed):
        # Detached, as in `Policy`: the gradient is that of the density, not of the noise's path.
        mixture = mixtures(embedding.weight.detach().to(dtype), positions, record.mixed, settings)
        at = record.fed.index_select(0, record.mixed)
        embeds = embeds.flatten(0, 1).index_copy(0, at, mixture.to(embeds.dtype)).view_as(embeds)
    hidden = model.base_model(
        inputs_embeds=embeds,
        attention_mask=record.attention_mask,
        position_ids=record.position_ids,
        use_cache=False,
    ).last_hidden_state
    head = model.get_output_embeddings().weight
    scores = score(
        hidden.flatten(0, 1).index_select(0, record.predictors).to(dtype),
        head.to(dtype),
        positions,
        settings,
        rewarded_T=record.rewarded,
        need_entropy=True,
    )
    assert scores.entropy is not None
    table_N = scores.density.new_zeros(record.size[0] * record.size[1])
    density, entropy = (
        table_N.index_copy(0, record.cells, part).view(record.size)
        for part in (scores.density, scores.entropy)
    )
    return density, entropy
