"""The inputs of a step: mixtures in the place of the tokens that soft requests have generated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from softgrpo_engine.execution.record import Record
from softgrpo_engine.scheduling.sequence import Sequence
from softgrpo_engine.transfer import to_device
from softgrpo_kernels import embedding_noise, soft_embedding
from softgrpo_kernels.embedding_noise import with_noise
from softgrpo_kernels.methods import method_of
from softgrpo_kernels.soft_weights import weights_within
from softgrpo_vllm.history import History
from softgrpo_vllm.request import SoftRequest, is_soft
from softgrpo_vllm.sampler import SoftSampler

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.worker.gpu.sample.sampler import Sampler
    from vllm.v1.worker.gpu.states import RequestState

NEVER = 2**62
# Embeddings gathered at a time: a long prompt of mixtures would take gigabytes.
GATHERED = 4096


class SoftModelState(DefaultModelState):
    """What vLLM's runner asks for a model that thinks softly.

    Its rows are vLLM's slots of requests. The device holds how each row draws and the candidates of
    its last position; earlier ones lie on the host, in `History`, and are needed only again where a
    request was preempted. All that decides which rows are touched is known on the host: no step
    waits for the device.

    On the host, by slot: is_soft; prompt_len; drawn, positions generated so far; budget, of soft
    ones; min_soft; noise_scale, of noise on mixtures; asks_mass; thinking_end.
    """

    supports_prompt_embeds = False

    def __init__(self, vllm_config: VllmConfig, model: Any, *rest: Any) -> None:
        super().__init__(vllm_config, model, *rest)
        rows = self.max_num_reqs
        # At one address: CUDA graphs are captured with it.
        self.embeds = torch.zeros(
            self.max_num_tokens, self.inputs_embeds_size, dtype=self.dtype, device=self.device
        )
        self.record, self.history = Record(rows, self.device), History()
        self.requests: dict[str, Sequence] = {}
        self._new: list[Sequence] = []
        # Preempted requests while they are computed again: all of their positions.
        self._again: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.is_soft, self.asks_mass = np.zeros(rows, dtype=bool), np.zeros(rows, dtype=bool)
        self.prompt_len, self.drawn, self.budget, self.min_soft, self.thinking_end = np.zeros(
            (5, rows), dtype=np.int64
        )
        self.noise_scale = np.zeros(rows, dtype=np.float32)
        self._unit: tuple[int, Tensor] | None = None
        self._tokenizer = None
        if not self.model_config.skip_tokenizer_init:
            self._tokenizer = cached_tokenizer_from_config(self.model_config)

    def custom_sampler(self, sampler: Sampler) -> tuple[SoftSampler, None]:
        """The sampler that draws the rows of soft requests; there is none of rejections."""
        return SoftSampler(sampler, self), None

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """A request gets a slot: a new one, or one that was preempted."""
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        self.is_soft[req_index] = is_soft(params)
        if not self.is_soft[req_index]:
            return
        assert params is not None
        request, request_id = SoftRequest.of(params), new_req_data.req_id
        assert request is not None
        prompt = list(new_req_data.prompt_token_ids or ())
        sequence = request.sequence(request_id, req_index, prompt, self._tokenizer)
        self.requests[request_id] = sequence
        self._new.append(sequence)
        drawn = len(new_req_data.prefill_token_ids or prompt) - len(prompt)
        self.history.start(request_id, drawn)
        soft = sequence.soft
        self.prompt_len[req_index], self.drawn[req_index] = len(prompt), drawn
        self.budget[req_index] = (soft and soft.max_soft_tokens) or NEVER
        self.min_soft[req_index] = soft.min_soft_tokens if soft else 0
        end = sequence.thinking_end
        self.thinking_end[req_index] = -1 if end is None else end
        adds_noise = soft is not None and method_of(soft.noise).adds_noise
        self.noise_scale[req_index] = soft.noise_scale if soft and adds_noise else 0.0
        self.asks_mass[req_index] = request.kept_mass

    def apply_staged_writes(self) -> None:
        """Requests that were added draw from now on."""
        super().apply_staged_writes()
        if not self._new:
            return
        new, self._new = self._new, []
        slots = max(sequence.slots for sequence in new)
        mass = any(self.asks_mass[sequence.row] for sequence in new)
        self.record.reserve(1, slots, mass)
        self.record.start(new)
        rows = {sequence: request_id for request_id, sequence in self.requests.items()}
        for sequence in new:
            if self.drawn[sequence.row]:
                self._resume(rows[sequence], sequence)

    def remove_request(self, req_id: str) -> None:
        """A request loses its slot: it has ended, or is preempted."""
        super().remove_request(req_id)
        sequence = self.requests.pop(req_id, None)
        if sequence is None:
            return
        self.is_soft[sequence.row] = False
        self._again.pop(req_id, None)
        self.history.leave(req_id)

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """The embeddings of a step, in the place of its tokens."""
        count, padded = input_batch.num_tokens, input_batch.num_tokens_after_padding
        self.embeds[:count] = self.model.embed_input_ids(input_batch.input_ids[:count])
        if self.requests:
            self._mix(input_batch)
        inputs = super().prepare_inputs(input_batch, req_states)
        return {**inputs, "input_ids": None, "inputs_embeds": self.embeds[:padded]}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """Those that graphs are captured with."""
        inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return {**inputs, "input_ids": None, "inputs_embeds": self.embeds[:num_tokens]}

    def write(self, request_ids: list[str], slots: np.ndarray, slot_B: Tensor, drawn: Any) -> None:
        """Keeps what was drawn in these slots."""
        self.record.write(slot_B, torch.zeros_like(slot_B), drawn)
        self.history.add(request_ids, drawn)
        self.drawn[slots] += 1
        for request_id in self._again.keys() & set(request_ids):
            del self._again[request_id]

    def _resume(self, request_id: str, sequence: Sequence) -> None:
        """Gives a request that was preempted its last position, and all for its next prefill."""
        ids, gprime, kind = self.history.read(request_id, self.device)
        row, record, slots = sequence.row, self.record, ids.shape[1]
        assert row is not None
        record.reserve(1, slots)
        drawn = record.drawn
        drawn.ids[row, 0].fill_(-1)
        drawn.gprime[row, 0].fill_(-torch.inf)
        drawn.ids[row, 0, :slots], drawn.gprime[row, 0, :slots] = ids[-1], gprime[-1]
        drawn.kind[row, 0], record.soft[row] = kind[-1], kind[-1]
        self._again[request_id] = ids, gprime, kind

    def _mix(self, batch: InputBatch) -> None:
        """Overwrites the inputs at generated positions of soft requests with their mixtures."""
        slots = batch.idx_mapping_np[: batch.num_reqs]
        first = batch.num_computed_tokens_np[: batch.num_reqs].astype(np.int64)
        starts = batch.query_start_loc_np[: batch.num_reqs]
        length = batch.num_scheduled_tokens[: batch.num_reqs].astype(np.int64)
        # Of each request, its first generated position in this chunk, and how many there are.
        begin = np.maximum(self.prompt_len[slots] - first, 0)
        count = np.where(self.is_soft[slots], np.maximum(length - begin, 0), 0)
        index = first + begin - self.prompt_len[slots]
        last = (count == 1) & (index == self.drawn[slots] - 1)
        if last.any():
            at = np.stack([(starts + begin)[last], slots[last], index[last]])
            where, row, index_T = to_device(at.astype(np.int64), self.device)
            inputs = self.record.inputs(row, torch.zeros_like(row))
            kind = self.record.drawn.kind[row, 0]
            self.embeds[where] = self._mixtures(*inputs, kind, slots[last], row, index_T)
        for i in np.flatnonzero((count > 0) & ~last):
            place, start, n = starts[i] + begin[i], int(index[i]), int(count[i])
            part = slice(start, start + n)
            ids, gprime, kind = (x[part] for x in self._again[batch.req_ids[i]])
            row = torch.full((n,), int(slots[i]), device=self.device)
            draws, columns = self.record.draws, self.record.rows + row
            weights = weights_within(gprime, kind, draws.tau[columns], draws.reach[columns])
            index_T = torch.arange(start, start + n, device=self.device)
            self.embeds[place : place + n] = self._mixtures(
                ids, weights, kind, np.full(n, slots[i]), row, index_T
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
        rows = max(1, GATHERED // ids_TK.shape[1])
        parts = zip(ids_TK.split(rows), weights_TK.split(rows), strict=True)
        mixtures_TH = torch.cat([self._mixtures_of(*part) for part in parts])
        scale = self.noise_scale[slots]
        if not scale.any():
            return mixtures_TH
        seed, position, uid, stream = self.record.noise_keys(row_T, index_T)
        noise_TH = embedding_noise(mixtures_TH.shape[1], seed, position, uid, stream)
        deviation_T = to_device(scale, self.device) * self._embedding_unit() * kind_T
        return with_noise(mixtures_TH, noise_TH, deviation_T[:, None])

    def _mixtures_of(self, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """By the model's own embedding, which may scale, be quantised, or lie on several ranks."""
        table = self.model.embed_input_ids(ids_TK.clamp(min=0).flatten())
        places = torch.arange(ids_TK.numel(), dtype=torch.int32, device=self.device)
        places_TK = torch.where(ids_TK < 0, -1, places.view(ids_TK.shape))
        return soft_embedding(places_TK, weights_TK, table)

    def _embedding_unit(self) -> Tensor:
        """The root mean square of the embedding table, float32, of the weights as they are."""
        version = self.model.weight_updates
        if self._unit is None or self._unit[0] != version:
            size = self.model_config.get_vocab_size()
            squares = torch.zeros((), dtype=torch.float64, device=self.device)
            for ids in torch.arange(size, device=self.device).split(GATHERED):
                rows = self.model.embed_input_ids(ids)
                squares += torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).double().square().sum()
            unit = (squares / (size * rows.shape[1])).sqrt().float()
            self._unit = version, unit
        return self._unit[1]
