"""Held-out evaluation during training: mean@n and pass@k, on a noise stream of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softgrpo.config import Config
from softgrpo.evaluation import pass_at_k
from softgrpo.rollout import EVALUATION_STREAM, collect, rollout_uids
from softgrpo_engine import LLM, Output


def evaluate(llm: LLM, prompts: Sequence[list[int]], config: Config) -> list[Output]:
    """Samples every held-out prompt ``eval.samples`` times with the rollout's settings."""
    return collect(
        llm,
        prompts,
        rollout_uids(0, len(prompts), config.eval.samples),
        config.rollout,
        config.algorithm.objective,
        seed=config.eval.seed,
        stream=EVALUATION_STREAM,
    )


def evaluation_row(
    step: int, outputs: Sequence[Output], rewards_S: Tensor, ks: Sequence[int]
) -> dict[str, Any]:
    """The metrics row of an evaluation.

    rewards_S: float [S] in output order; NaN (not scored) counts as 0. mean@n is the mean reward;
    a sample is correct for pass@k when its reward is at least 1.
    """
    rewards = torch.nan_to_num(rewards_S, nan=0.0)
    n = len(outputs[0].samples)
    correct = (rewards.view(-1, n) >= 1.0).sum(-1).tolist()
    samples = [sample for output in outputs for sample in output.samples]
    row: dict[str, Any] = {"step": step, f"eval/mean@{n}": float(rewards.mean())}
    for k in ks:
        row[f"eval/pass@{k}"] = sum(pass_at_k(n, c, k) for c in correct) / len(correct)
    lengths = [len(sample.token_ids) for sample in samples]
    row["eval/mean_length"] = sum(lengths) / len(lengths)
    row["eval/clipped_ratio"] = sum(s.finish_reason == "length" for s in samples) / len(samples)
    return row
