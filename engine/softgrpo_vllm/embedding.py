"""What mixtures are made of: the embedding of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from softgrpo_kernels import soft_embedding

# Embeddings gathered at a time: a long prompt of mixtures would take gigabytes.
GATHERED = 4096


class InputEmbedding:
    """`embed_input_ids` of a model, which may scale, be quantised, or lie on several ranks. Where
    all it does is to look up rows of a table on this rank, one kernel mixes these.

    vocabulary: tokens of the model. What is known of the weights is found again after an update.
    """

    def __init__(self, model: Any, vocabulary: int, device: torch.device) -> None:
        self.model, self.vocabulary, self.device = model, vocabulary, device
        self._table: VocabParallelEmbedding | None = None
        self._unit: Tensor | None = None
        self._table_of = self._unit_of = -1  # of how many weight updates

    def mixtures(self, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """sum_k weights[t, k] embed(ids[t, k]): [T, H], fp32 sums in slot order and one rounding.

        ids: int32, -1 in unused slots; weights: float32. Waits for the device once after an update
        of the weights.
        """
        if self._table_of != self.model.weight_updates:
            self._table, self._table_of = self._find_table(), self.model.weight_updates
        if self._table is not None:
            return soft_embedding(ids_TK, weights_TK, self._table.weight)
        rows = max(1, GATHERED // ids_TK.shape[1])
        parts = zip(ids_TK.split(rows), weights_TK.split(rows), strict=True)
        return torch.cat([self._gathered(*part) for part in parts])

    def unit(self) -> Tensor:
        """The root mean square of all embeddings, float32, of the weights as they are."""
        if self._unit is None or self._unit_of != self.model.weight_updates:
            squares = torch.zeros((), dtype=torch.float64, device=self.device)
            for ids in self._all_ids():
                rows = self.model.embed_input_ids(ids)
                norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
                squares += norms.double().square().sum()
            self._unit = (squares / (self.vocabulary * rows.shape[1])).sqrt().float()
            self._unit_of = self.model.weight_updates
        return self._unit

    def _gathered(self, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        table = self.model.embed_input_ids(ids_TK.clamp(min=0).flatten())
        places = torch.arange(ids_TK.numel(), dtype=torch.int32, device=self.device)
        places_TK = torch.where(ids_TK < 0, -1, places.view(ids_TK.shape))
        return soft_embedding(places_TK, weights_TK, table)

    def _find_table(self) -> VocabParallelEmbedding | None:
        """The module whose rows are the embeddings, found by comparing those of all tokens."""
        tables = (m for m in self.model.modules() if isinstance(m, VocabParallelEmbedding))
        return next((table for table in tables if self._is_plain(table)), None)

    def _is_plain(self, table: VocabParallelEmbedding) -> bool:
        weight = getattr(table, "weight", None)  # a quantised one may have none
        # Every rank must find the same, or one of them would wait for the others' part.
        if table.tp_size > 1 or weight is None or len(weight) < self.vocabulary:
            return False
        differs = torch.zeros((), dtype=torch.bool, device=self.device)
        parts = weight[: self.vocabulary].split(GATHERED)
        for ids, rows in zip(self._all_ids(), parts, strict=True):
            found = self.model.embed_input_ids(ids)
            if _kind(found) != _kind(rows):
                return False
            differs |= (found != rows).any()
        return not bool(differs)

    def _all_ids(self) -> tuple[Tensor, ...]:
        return torch.arange(self.vocabulary, device=self.device).split(GATHERED)


def _kind(x: Tensor) -> tuple[torch.dtype, torch.device, torch.Size]:
    return x.dtype, x.device, x.shape
