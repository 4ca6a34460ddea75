"""Samples as people read them: one row of samples.jsonl each."""

from __future__ import annotations

from typing import Any

import torch

from softgrpo_engine import Sample, SoftTokens
from softgrpo_kernels import soft_weights

# A candidate under this weight contributes nothing that anyone could see.
_VISIBLE_WEIGHT = 5e-4


def sample_row(
    sample: Sample,
    *,
    step: int,
    phase: str,
    prompt: str,
    answer: str,
    reward: float | None,
    advantage: float | None,
    tau: float,
    tokenizer: Any,
) -> dict[str, Any]:
    """One sample with the candidates and weights of every position."""
    return {
        "step": step,
        "phase": phase,
        "prompt": prompt,
        "answer": answer,
        "text": sample.text,
        "reward": reward,
        "advantage": advantage,
        "finish_reason": sample.finish_reason,
        "uid": sample.uid,
        "positions": position_rows(sample.soft, tau, tokenizer),
    }


def position_rows(record: SoftTokens, tau: float, tokenizer: Any) -> list[dict[str, Any]]:
    """Token, kind, forced and the visible candidates with their weights, for every position."""
    weights = soft_weights(record.gprime, record.kind, tau)
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
