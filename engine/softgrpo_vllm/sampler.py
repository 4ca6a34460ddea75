"""The draw: soft requests by our op, all others by vLLM's sampler; and the record as logprobs."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler

from softgrpo_engine.transfer import to_device
from softgrpo_kernels import SoftToken, soft_token_of_rows
from softgrpo_kernels.record_step import record_parameters
from softgrpo_vllm.flags import COUNT_SHIFT, FORCED, INVALID, KIND, MASS_SHIFT
from softgrpo_vllm.report import report
from softgrpo_vllm.request import is_soft
from softgrpo_vllm.rows import SoftRows

if TYPE_CHECKING:
    from vllm import SamplingParams


class SoftSampler(Sampler):
    """vLLM's sampler, with all that it holds, and the draw of soft requests."""

    def __init__(self, stock: Sampler, rows: SoftRows, model: Any) -> None:
        self.__dict__.update(vars(stock))
        self.rows, self.model = rows, model

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> None:
        """A request gets a slot. Where vLLM draws plain requests beside soft ones, it draws these
        too, for nothing: as cheaply as it can."""
        if is_soft(sampling_params):
            sampling_params = copy.copy(sampling_params)
            sampling_params.temperature = sampling_params.top_p = 1.0
            sampling_params.top_k, sampling_params.min_p, sampling_params.seed = 0, 0.0, None
        super().add_request(req_idx, sampling_params)

    def __call__(self, logits: Tensor, input_batch: InputBatch) -> SamplerOutput:
        """Draws a token of every request; logits: [R, V]."""
        batch = input_batch
        soft = self.rows.is_soft[batch.idx_mapping_np]
        if not soft.any():
            return super().__call__(logits, batch)
        # A request in the midst of its prompt draws nothing.
        length = batch.num_computed_tokens_np + batch.num_scheduled_tokens
        rows = np.flatnonzero(soft & (length >= batch.prefill_len_np))
        out = self._empty(logits, batch) if soft.all() else super().__call__(logits, batch)
        if len(rows):
            index = length[rows] - self.rows.prompt_len[batch.idx_mapping_np[rows]]
            self._draw(logits, batch, rows, index, out)
        return out

    def _draw(
        self,
        logits: Tensor,
        batch: InputBatch,
        rows: np.ndarray,
        index: np.ndarray,
        out: SamplerOutput,
    ) -> None:
        """Draws generated position ``index`` of these rows of the batch, and puts it into out."""
        known, record = self.rows, self.rows.record
        slots = batch.idx_mapping_np[rows].astype(np.int64)
        row_B, slot_B, index_B = to_device(np.stack([rows, slots, index]), logits.device)
        terminal_BE = record.terminal_ids[slot_B]
        logits_BV, is_raw = self._processed(logits, batch, slots)
        logits_BV = logits_BV[row_B]
        held = index < known.min_soft[slots]
        if held.any():
            _hold_back(logits_BV, terminal_BE, to_device(held, logits.device))
        over_B = self._budget_spent(slots, slot_B, index)
        drawn = soft_token_of_rows(
            logits_BV,
            record_parameters(record.tables, slot_B, index_B),
            terminal_ids=terminal_BE,
            need_kept_mass=record.keeps_mass,
            **(self._head(row_B) if is_raw else {}),
        )
        flags_B = ~drawn.valid * INVALID
        # NaN: a token that the embedding has; whoever reads the flag knows better.
        drawn = dataclasses.replace(drawn, token=drawn.token.clamp(min=0))
        if over_B is not None:
            end_B = to_device(known.thinking_end[slots].astype(np.int32), logits.device)
            over_B = over_B & (end_B >= 0)
            drawn = _forced(drawn, over_B, end_B)
            flags_B = torch.where(over_B, FORCED, flags_B)
        known.write([batch.req_ids[row] for row in rows], slots, slot_B, drawn)
        out.sampled_token_ids[row_B, 0] = drawn.token.to(out.sampled_token_ids.dtype)
        if out.logprobs_tensors is None:
            return
        flags_B = (flags_B + drawn.kind * KIND + (drawn.n << COUNT_SHIFT)).long()
        if known.asks_mass[slots].any():
            assert drawn.kept_mass is not None
            bits_B = drawn.kept_mass.float().view(torch.int32).long() & 0xFFFFFFFF
            asks_B = to_device(known.asks_mass[slots], logits.device)
            flags_B = flags_B + (bits_B << MASS_SHIFT) * asks_B
        ids, logprobs, ranks, *_ = out.logprobs_tensors
        report(ids, logprobs, ranks, row_B, drawn, flags_B)

    def _budget_spent(self, slots: np.ndarray, slot_B: Tensor, index: np.ndarray) -> Tensor | None:
        """bool [B], rows that still think after their last soft position; None: there are none.

        Without a token that ends thinking the rest simply is discrete.
        """
        spent = index == self.rows.budget[slots]
        if not spent.any():
            return None
        soft = self.rows.record.soft
        over_B = to_device(spent, slot_B.device) & (soft[slot_B] == 1)
        soft[slot_B] = torch.where(over_B, 0, soft[slot_B])
        return over_B

    def _head(self, row_B: Tensor) -> dict[str, Any]:
        """Logits in bfloat16 carry a rounding of up to 2^-9 |z|: with these, those of the
        candidates are computed again in fp32, as our engine and the trainer do.

        Not for a head that is split over ranks, quantised, or does more than a product; nor where
        vLLM's head_dtype makes all logits fp32.
        """
        product = self.model.head_product
        if product is None or get_tensor_model_parallel_world_size() > 1:
            return {}
        hidden, weight = product.hidden, getattr(product.head, "weight", None)
        if weight is None or weight.dtype != hidden.dtype or product.logits.dtype == torch.float32:
            return {}
        return {"hidden": hidden[row_B], "lm_head": weight, "bias": product.bias}

    def _processed(
        self, logits: Tensor, batch: InputBatch, slots: np.ndarray
    ) -> tuple[Tensor, bool]:
        """Logits after bias, penalties and the like, before the temperature; whether those of these
        slots are as the model gave them, whatever other requests of the batch ask for."""
        if not np.any(self.needs_logits_processing[slots]):
            return logits, True
        logits = logits.float().clone()
        context = LogitsContext(
            expanded_idx_mapping=batch.expanded_idx_mapping,
            idx_mapping=batch.idx_mapping,
            idx_mapping_np=batch.idx_mapping_np,
            expanded_local_pos=batch.expanded_local_pos,
            input_ids=batch.input_ids[batch.logits_indices],
            pos=batch.positions[batch.logits_indices],
            seq_lens_upper_bound_np=batch.seq_lens_cpu_upper_bound.numpy(),
        )
        for processor in self.logits_processors:
            logits = processor.apply(logits, context)
        self.thinking_budget_state.apply(logits, context)
        return logits, False

    def _empty(self, logits: Tensor, batch: InputBatch) -> SamplerOutput:
        """Room for a batch of which vLLM draws nothing."""
        count, logprobs = batch.num_reqs, None
        dims = self.get_logprobs_dims(batch.idx_mapping_np)
        if dims is not None:
            logprobs = LogprobsTensors(
                logits.new_zeros(count, dims[0] + 1, dtype=torch.int32),
                logits.new_full((count, dims[0] + 1), -torch.inf, dtype=torch.float32),
                logits.new_zeros(count, dtype=torch.int64),
            )
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            batch.seq_lens.new_ones(count),
            batch.seq_lens,
            batch.cu_num_logits,
            batch.idx_mapping,
            self.req_states.prefill_len.gpu,
        )
        return SamplerOutput(
            sampled_token_ids=logits.new_zeros(count, 1, dtype=torch.int64),
            logprobs_tensors=logprobs,
            num_nans=get_num_nans(logits) if self.compute_nans else None,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )


def _hold_back(logits_BV: Tensor, ids_BE: Tensor, rows_B: Tensor) -> None:
    """These rows cannot draw these ids, -1 pads."""
    holds_BE = rows_B[:, None] & (ids_BE >= 0)
    bound_BE = torch.where(holds_BE, -torch.inf, torch.inf).to(logits_BV.dtype)
    # The smaller of logit and bound: a pad, whatever id it stands for, changes nothing.
    logits_BV.scatter_reduce_(1, ids_BE.clamp(min=0).long(), bound_BE, "amin")


def _forced(drawn: SoftToken, rows_B: Tensor, token_B: Tensor) -> SoftToken:
    """What was drawn, with a token that nobody chose in the place of some rows."""
    slot_0 = torch.arange(drawn.ids.shape[1], device=rows_B.device) == 0
    first_BK, rows_B1 = rows_B[:, None] & slot_0, rows_B[:, None]
    mass = drawn.kept_mass
    return dataclasses.replace(
        drawn,
        ids=torch.where(first_BK, token_B[:, None], drawn.ids.masked_fill(rows_B1, -1)),
        gprime=drawn.gprime.masked_fill(rows_B1, -torch.inf).masked_fill(first_BK, 0.0),
        weights=torch.where(rows_B1, slot_0.to(drawn.weights.dtype), drawn.weights),
        kind=drawn.kind.masked_fill(rows_B, 0),
        n=drawn.n.masked_fill(rows_B, 1),
        token=torch.where(rows_B, token_B, drawn.token),
        token_logp=drawn.token_logp.masked_fill(rows_B, 0.0),
        kept_mass=None if mass is None else mass.masked_fill(rows_B, 1.0),
    )
