"""Samples as people read them: one row of samples.jsonl each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softgrpo.rollout.scored import ScoredRollout
from softgrpo_engine import SoftTokens
from softgrpo_kernels import soft_weights

# tau and weight_floor, of which `soft_weights` makes the weights.
Mixture = tuple[float, float]
# A candidate under this weight contributes nothing that anyone could see.
_VISIBLE_WEIGHT = 5e-4


def sample_rows(
    scored: ScoredRollout,
    advantages_S: Tensor | None,
    count: int,
    *,
    step: int,
    phase: str,
    mixture: Mixture,
    tokenizer: Any,
) -> list[dict[str, Any]]:
    """The first sample of each of the first `count` prompts, with the candidates and weights of
    every position."""
    rows = []
    first = 0  # of the prompt, among all samples
    for prompt, output in list(zip(scored.prompts, scored.outputs, strict=True))[:count]:
        sample = output.samples[0]
        rows.append(
            {
                "step": step,
                "phase": phase,
                "prompt": prompt.example.text,
                "answer": prompt.example.answer,
                "text": sample.text,
                "reward": float(scored.rewards_S[first]),
                "advantage": None if advantages_S is None else float(advantages_S[first]),
                "finish_reason": sample.finish_reason,
                "uid": sample.uid,
                "positions": position_rows(sample.soft, mixture, tokenizer),
            }
        )
        first += len(output.samples)
    return rows


def position_rows(record: SoftTokens, mixture: Mixture, tokenizer: Any) -> list[dict[str, Any]]:
    """Token, kind, forced and the visible candidates with their weights, for every position."""
    weights = soft_weights(record.gprime, record.kind, *mixture)
    return [
        {
            "token": tokenizer.decode([token]),
            "kind": kind,
            "forced": forced,
            "candidates": [
                [tokenizer.decode([candidate]), round(weight, 4)]
                for candidate, weight in zip(ids, row, strict=True)
                if candidate >= 0 and weight >= _VISIBLE_WEIGHT
            ],
        }
        for token, kind, forced, ids, row in zip(
            record.token.tolist(),
            record.kind.tolist(),
            record.forced.to(torch.bool).tolist(),
            record.ids.tolist(),
            weights.tolist(),
            strict=True,
        )
    ]
