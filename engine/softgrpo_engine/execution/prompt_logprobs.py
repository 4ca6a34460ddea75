"""Log-probabilities of the tokens of a prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_engine.model.decoder import Decoder
from softgrpo_engine.outputs import PromptLogprobs
from softgrpo_kernels import linear_token_logprob
from softgrpo_kernels.indexed_dot import indexed_dot

# Logits of so many positions are in memory at once.
_ROWS = 256


def prompt_logprobs(hidden_TH: Tensor, ids_T: Tensor, decoder: Decoder, top: int) -> PromptLogprobs:
    """Of the tokens ids_T, int64, that follow positions with these final hidden states; ``top``
    most likely ones at each."""
    parts = [
        _part(hidden, ids, decoder, top)
        for hidden, ids in zip(hidden_TH.split(_ROWS), ids_T.split(_ROWS), strict=True)
    ]
    logprobs, top_ids, top_logprobs = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return PromptLogprobs(logprobs, top_ids, top_logprobs)


def _part(
    hidden_TH: Tensor, ids_T: Tensor, decoder: Decoder, top: int
) -> tuple[Tensor, Tensor, Tensor]:
    lm_head = decoder.lm_head_weight
    logprobs_T = linear_token_logprob(hidden_TH, lm_head, ids_T)
    # bf16 logits choose them; as in a draw, their own values are computed again in fp32.
    best_TK = decoder.logits(hidden_TH).topk(top, dim=-1).indices
    logits = indexed_dot(hidden_TH, lm_head, torch.cat([ids_T[:, None], best_TK], dim=1))
    top_TK = logits[:, 1:] - logits[:, :1] + logprobs_T[:, None]
    top_TK, order = top_TK.sort(dim=-1, descending=True)
    return logprobs_T, best_TK.gather(1, order).int(), top_TK
