"""The inputs of a step: mixtures in the place of the tokens that soft requests have generated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from softgrpo_engine.transfer import to_device
from softgrpo_kernels import embedding_noise
from softgrpo_kernels.embedding_noise import with_noise
from softgrpo_vllm.embedding import InputEmbedding
from softgrpo_vllm.request import SoftRequest
from softgrpo_vllm.rows import Positions, SoftRows
from softgrpo_vllm.sampler import SoftSampler

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.worker.gpu.sample.sampler import Sampler
    from vllm.v1.worker.gpu.states import RequestState


class SoftModelState(DefaultModelState):
    """What vLLM's runner asks for a model that thinks softly."""

    supports_prompt_embeds = False

    def __init__(self, vllm_config: VllmConfig, model: Any, *rest: Any) -> None:
        super().__init__(vllm_config, model, *rest)
        self.rows = SoftRows(self.max_num_reqs, self.device)
        # At one address: CUDA graphs are captured with it.
        self.embeds = torch.zeros(
            self.max_num_tokens, self.inputs_embeds_size, dtype=self.dtype, device=self.device
        )
        vocabulary = self.model_config.get_vocab_size()
        self.embedding = InputEmbedding(model, vocabulary, self.device)
        self._tokenizer = None
        if not self.model_config.skip_tokenizer_init:
            self._tokenizer = cached_tokenizer_from_config(self.model_config)

    def custom_sampler(self, sampler: Sampler) -> tuple[SoftSampler, None]:
        """The sampler that draws the rows of soft requests; there is none of rejections."""
        return SoftSampler(sampler, self.rows, self.model), None

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """A request gets a slot: a new one, or one that was preempted."""
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        request = None if params is None else SoftRequest.of(params)
        if request is None:
            return
        prompt = list(new_req_data.prompt_token_ids or ())
        drawn = len(new_req_data.prefill_token_ids or prompt) - len(prompt)
        self.rows.add(new_req_data.req_id, req_index, request, prompt, drawn, self._tokenizer)

    def apply_staged_writes(self) -> None:
        """Requests that were added draw from now on."""
        super().apply_staged_writes()
        self.rows.start()

    def remove_request(self, req_id: str) -> None:
        """A request loses its slot: it has ended, or is preempted."""
        super().remove_request(req_id)
        self.rows.remove(req_id)

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """The embeddings of a step, in the place of its tokens."""
        count, padded = input_batch.num_tokens, input_batch.num_tokens_after_padding
        self.embeds[:count] = self.model.embed_input_ids(input_batch.input_ids[:count])
        if self.rows.is_soft.any():
            self._mix(input_batch)
        inputs = super().prepare_inputs(input_batch, req_states)
        return {**inputs, "input_ids": None, "inputs_embeds": self.embeds[:padded]}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """Those that graphs are captured with."""
        inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return {**inputs, "input_ids": None, "inputs_embeds": self.embeds[:num_tokens]}

    def _mix(self, batch: InputBatch) -> None:
        """Overwrites the inputs at generated positions of soft requests with their mixtures."""
        rows = self.rows
        slots = batch.idx_mapping_np[: batch.num_reqs]
        first = batch.num_computed_tokens_np[: batch.num_reqs].astype(np.int64)
        length = batch.num_scheduled_tokens[: batch.num_reqs].astype(np.int64)
        # Of each request, its first generated position in this chunk, and how many there are.
        begin = np.maximum(rows.prompt_len[slots] - first, 0)
        count = np.where(rows.is_soft[slots], np.maximum(length - begin, 0), 0)
        place = batch.query_start_loc_np[: batch.num_reqs] + begin
        index = first + begin - rows.prompt_len[slots]
        last = (count == 1) & (index == rows.drawn[slots] - 1)
        if last.any():
            at = np.stack([place[last], slots[last], index[last]]).astype(np.int64)
            where, row, index_T = to_device(at, self.device)
            inputs = rows.ids[row], rows.weights[row], rows.kind[row]
            self.embeds[where] = self._mixtures(*inputs, slots[last], row, index_T)
        for i in np.flatnonzero((count > 0) & ~last):
            slot, start, n = int(slots[i]), int(index[i]), int(count[i])
            positions = Positions(*(x[start : start + n] for x in rows.preempted[batch.req_ids[i]]))
            row = torch.full((n,), slot, device=self.device)
            index_T = torch.arange(start, start + n, device=self.device)
            inputs = positions.ids, rows.weights_of(slot, positions), positions.kind
            self.embeds[place[i] : place[i] + n] = self._mixtures(
                *inputs, np.full(n, slot), row, index_T
            )

    def _mixtures(
        self,
        ids_TK: Tensor,
        weights_TK: Tensor,
        kind_T: Tensor,
        slots: np.ndarray,
        row_T: Tensor,
        index_T: Tensor,
    ) -> Tensor:
        """Mixtures [T, H], with noise where their requests ask for it."""
        mixtures_TH = self.embedding.mixtures(ids_TK, weights_TK)
        scale = self.rows.noise_scale[slots]
        if not scale.any():
            return mixtures_TH
        seed, position, uid, stream = self.rows.record.noise_keys(row_T, index_T)
        noise_TH = embedding_noise(mixtures_TH.shape[1], seed, position, uid, stream)
        deviation_T = to_device(scale, self.device) * self.embedding.unit() * kind_T
        return with_noise(mixtures_TH, noise_TH, deviation_T[:, None])
