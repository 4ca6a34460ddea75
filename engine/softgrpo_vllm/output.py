"""The record of a soft request, from the logprobs that vLLM gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from softgrpo_engine.soft_tokens import SoftTokens
from softgrpo_vllm.flags import COUNT_MASK, COUNT_SHIFT, FORCED, INVALID, KIND, MASS_SHIFT

if TYPE_CHECKING:
    from vllm import CompletionOutput


@dataclass(frozen=True)
class SoftRecord:
    """soft: SoftTokens [T, K], K the logprobs that were asked for. logprobs: float32 [T], log p of
    the token. kept_mass: float32 [T], as in `softgrpo_engine.Sample`; it means something where
    soft_kept_mass asked for it."""

    soft: SoftTokens
    logprobs: Tensor
    kept_mass: Tensor


def soft_record(output: CompletionOutput) -> SoftRecord:
    """The record of ``RequestOutput.outputs[i]`` of a soft request with flat_logprobs=True.

    Raises ValueError without them, or with fewer logprobs than a position has candidates;
    FloatingPointError where logits were not finite.
    """
    flat: Any = output.logprobs
    length = len(output.token_ids)
    if length and not hasattr(flat, "start_indices"):
        raise ValueError("no record: ask with SamplingParams(logprobs=K, flat_logprobs=True)")
    width = len(flat.logprobs) // length if length else 1
    ids, values, ranks = (
        np.array(column, dtype=dtype).reshape(length, width)
        for column, dtype in (
            (flat.token_ids, np.int32),
            (flat.logprobs, np.float32),
            (flat.ranks, np.int64),
        )
    )
    flags: np.ndarray = ranks[:, 0].astype(np.int64)
    if (flags & INVALID).any():
        raise FloatingPointError("the logits of a sample are not finite: the weights are broken")
    # A candidate may have g' = -inf; columns after the last one hold other ids.
    counts = flags >> COUNT_SHIFT & COUNT_MASK
    if length and (most := int(counts.max())) >= width:
        raise ValueError(
            f"a position has {most} candidates, and {width - 1} logprobs were asked for: ask with "
            f"SamplingParams(logprobs={most})"
        )
    candidates = np.where(np.arange(width - 1) < counts[:, None], ids[:, 1:], -1)
    soft = SoftTokens(
        ids=torch.from_numpy(candidates.astype(np.int32)),
        gprime=torch.from_numpy(values[:, 1:].copy()),
        kind=torch.from_numpy((flags & KIND).astype(np.uint8)),
        forced=torch.from_numpy((flags & FORCED) > 0),
        token=torch.from_numpy(ids[:, 0].copy()),
    )
    mass = (flags >> MASS_SHIFT).astype(np.uint32).view(np.float32)
    return SoftRecord(soft, torch.from_numpy(values[:, 0].copy()), torch.from_numpy(mass))
