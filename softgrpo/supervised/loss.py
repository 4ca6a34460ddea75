"""Cross-entropy to distributions, read as the mixtures that they are.

CSFT of CoT2 (arXiv 2505.23648, section 3): the target of a position is a distribution d over
tokens, its loss -sum_i d_i log q_i with q the softmax over the whole vocabulary, and the position
after it reads sum_i d_i E[i]. A token is the distribution of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from softgrpo.supervised.traces import Trace
from softgrpo_engine.model.decoder import Decoder
from softgrpo_engine.training.group_attention import GroupAttention
from softgrpo_engine.transfer import on_device
from softgrpo_kernels import linear_candidate_logprob, linear_token_logprob, soft_embedding
from softgrpo_kernels.indexed_dot import indexed_dot_add_to_table

_LOGITS = 2**24  # numbers of one slice of logits, where the most likely token is looked for


@dataclass(frozen=True)
class PackedTraces:
    """Traces one behind the other, in T rows; the last position of each is not read.

    lens: rows of each trace. positions: int64 [T], in the trace. ids: int32 [T, K], weights:
    float32 [T, K]: the mixture that is read; a token has weight 1. predictors: int64 [P], the row
    that predicts each trained position; target_ids: int32 [P, K], target_weights: float32 [P, K].
    tokens: int64 [S], those of the P positions whose target is one token.
    """

    lens: list[int]
    positions: Tensor
    ids: Tensor
    weights: Tensor
    predictors: Tensor
    target_ids: Tensor
    target_weights: Tensor
    tokens: Tensor

    @staticmethod
    def of(traces: Sequence[Trace]) -> PackedTraces:
        """On the host."""
        slots = max(trace.ids.shape[1] for trace in traces)
        ids, weights, predictors, target_ids, target_weights = [], [], [], [], []
        row = 0
        for trace in traces:
            own_ids = F.pad(trace.ids, (0, slots - trace.ids.shape[1]), value=-1)
            own_weights = F.pad(trace.weights, (0, slots - trace.ids.shape[1]))
            prompt = F.pad(trace.prompt_ids[:, None], (0, slots - 1), value=-1)
            ids += [prompt, own_ids[:-1]]
            weights += [(prompt >= 0).float(), own_weights[:-1]]
            first = row + len(trace.prompt_ids) - 1
            predictors.append(first + trace.trained.nonzero()[:, 0])
            target_ids.append(own_ids[trace.trained])
            target_weights.append(own_weights[trace.trained])
            row += len(trace)
        targets = torch.cat(target_ids)
        return PackedTraces(
            [len(trace) for trace in traces],
            torch.cat([torch.arange(len(trace)) for trace in traces]),
            torch.cat(ids),
            torch.cat(weights),
            torch.cat(predictors),
            targets,
            torch.cat(target_weights),
            ((targets >= 0).sum(-1) == 1).nonzero()[:, 0],
        )

    @property
    def entropy(self) -> float:
        """Sum of the entropies of the P targets, nats: no loss falls below it."""
        return float(torch.special.entr(self.target_weights.double()).sum())


def cross_entropy(
    decoder: Decoder, packed: PackedTraces, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The loss [P] of every trained position, differentiable, float32 (float64 for float64), and
    how many of the positions with one token have it as the most likely one, int64 [].

    decoder: master weights, in training mode. packed: on the host. dtype: of the computation. The
    gradient of the input and the output embeddings is added straight into their .grad.
    """
    device = decoder.embed_weight.device
    packed = on_device(packed, device)
    config = decoder.config
    attention = GroupAttention(
        packed.lens, [()] * len(packed.lens), config.num_heads, config.num_kv_heads, device
    )
    read_TH = _Mixture.apply(packed.ids, packed.weights, decoder.embed_weight, dtype)
    hidden_TH = decoder(read_TH, packed.positions, attention)
    hidden_PH = hidden_TH.index_select(0, packed.predictors)
    master_VH = decoder.lm_head_weight
    head_VH = master_VH.detach().to(dtype)
    ids_PK, weights_PK = packed.target_ids, packed.target_weights
    # log q_i = log q_0 + (log s_i - log s_0), s the softmax over the listed tokens: one row of
    # logits is reduced for a position, whatever number of tokens its target has.
    first_P = linear_token_logprob(hidden_PH, head_VH, ids_PK[:, 0], grad_weight=master_VH)
    listed_PK = linear_candidate_logprob(hidden_PH, head_VH, ids_PK, grad_weight=master_VH)
    above_first_PK = (listed_PK - listed_PK[:, :1]).masked_fill(ids_PK < 0, 0.0)
    loss_P = -(first_P + (weights_PK * above_first_PK).sum(-1))
    likeliest = _most_likely(hidden_PH.detach().index_select(0, packed.tokens), head_VH)
    return loss_P, (likeliest == ids_PK[:, 0].index_select(0, packed.tokens)).sum()


def _most_likely(hidden_SH: Tensor, head_VH: Tensor) -> Tensor:
    """[S], without the logits of all rows at a time."""
    rows = max(1, _LOGITS // len(head_VH))
    return torch.cat([F.linear(part, head_VH).argmax(-1) for part in hidden_SH.split(rows)])


class _Mixture(torch.autograd.Function):
    """`soft_embedding` of master weights in another dtype. Its gradient, sum over the mixtures of
    w_i grad in row i, is added into the master's .grad: no [V, H] temporary."""

    @staticmethod
    def forward(
        ctx: Any, ids_TK: Tensor, weights_TK: Tensor, master_VH: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(ids_TK, weights_TK)
        ctx.master = master_VH  # itself: a saved tensor may be another object
        return soft_embedding(ids_TK, weights_TK, master_VH.detach().to(dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[None, ...]:
        ids_TK, weights_TK = ctx.saved_tensors
        if ctx.master.grad is None:
            ctx.master.grad = torch.zeros_like(ctx.master)
        indexed_dot_add_to_table(ctx.master.grad, weights_TK, grad_TH.contiguous(), ids_TK)
        return None, None, None, None
