"""softgrpo-train --dry-run: everything is checked and tried on a tiny step, nothing is kept."""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from softgrpo.config import Config
from softgrpo.report.words import duration
from softgrpo.rewards import RewardRunner
from softgrpo.rewards.runner import ByFunction
from softgrpo.trainer import Trainer
from softgrpo_engine import Output

_PROMPTS, _SAMPLES, _TOKENS = 2, 2, 4


def dry_run(config: Config) -> str | None:
    """Checks a run as training does, tries it, and says in one screen what it would be.

    A step of 2 prompts x 2 samples x 4 tokens goes all the way: rollout, rewards, update, sync.
    A second one of 4 tokens, with as many samples as the run has, is timed. Raises what training
    would raise, and leaves no run folder. Of several processes only the first has something to say.
    """
    trainer = Trainer(config)
    rewards, rollout = trainer.rewards, config.rollout
    trainer.rewards = _MadeUpRewards(rewards)
    try:
        trainer.config = _small(config, max(_PROMPTS, trainer.world.size), _SAMPLES)
        trainer.step(1)
        trainer.config = _small(config, rollout.prompts_per_step, rollout.group_size)
        row = trainer.step(2)
    finally:
        rewards.close()
    if not trainer.world.is_first:
        return None
    return "\n".join(f"{label:<8}  {value}" for label, value in _facts(config, trainer, row))


def _small(config: Config, prompts: int, samples: int) -> Config:
    """Steps of so many samples of 4 tokens, learnt from though cut, and nothing is written."""
    rollout = dataclasses.replace(
        config.rollout,
        prompts_per_step=prompts,
        group_size=samples,
        max_new_tokens=_TOKENS,
        ahead=0,
    )
    algorithm = dataclasses.replace(config.algorithm, overlong_buffer=0, mask_truncated=False)
    log = dataclasses.replace(config.log, samples_every=0)
    return dataclasses.replace(config, rollout=rollout, algorithm=algorithm, log=log)


class _MadeUpRewards(RewardRunner):
    """Calls the run's rewards, then gives 0, 1, 0, ...: 4 tokens all earn the same as a rule, and
    equal rewards would leave the update untried."""

    def __init__(self, real: RewardRunner) -> None:
        self.__dict__ = real.__dict__

    def total(
        self, rewards: ByFunction, outputs: Sequence[Output]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rewards_S, by_function = super().total(rewards, outputs)
        return (torch.arange(len(rewards_S)) % 2).float(), by_function


def _facts(config: Config, trainer: Trainer, row: dict[str, Any]) -> list[tuple[str, str]]:
    """Label and value of every line. row: the metrics of the timed step."""
    rollout, algorithm, data = config.rollout, config.algorithm, trainer.data
    parameters = sum(p.numel() for p in trainer.policy.decoder.parameters())
    samples = rollout.prompts_per_step * rollout.group_size
    prompt_tokens = sum(
        len(prompt.token_ids) for prompt in data.prompts_of_round(1, rollout.prompts_per_step)
    )
    response_tokens = samples * rollout.max_new_tokens
    longer = (prompt_tokens + response_tokens) / (prompt_tokens + samples * _TOKENS)
    seconds = row["time/reward"] + row["time/sync"] + row["time/train"] * longer
    seconds += row["time/rollout"] * rollout.max_new_tokens / _TOKENS
    left_out = f", {data.removed} more are held out or shown" if data.removed else ""
    left_out += f", {data.too_long} are too long" if data.too_long else ""
    weights = _training_bytes(trainer) / 2**30
    return [
        ("model", f"{config.model.path}: {parameters:,} parameters, {config.model.dtype}"),
        ("engine", f"{rollout.engine}, {'soft thinking' if rollout.soft.enabled else 'discrete'}"),
        ("method", f"{algorithm.objective}, {algorithm.advantage}, lr {config.optim.lr:g}"),
        ("data", f"{config.data.train}: {len(data.train):,} examples{left_out}"),
        ("held out", f"{config.data.eval}: {len(data.held_out)}" if data.held_out else "none"),
        ("rewards", ", ".join(f.path for f in config.reward.functions)),
        (
            "a step",
            f"{rollout.prompts_per_step} prompts x {rollout.group_size} samples: {prompt_tokens:,} "
            f"prompt tokens, at most {response_tokens:,} new ones",
        ),
        (
            "memory",
            f"{_peak_gib():.1f} GiB at the peak of this dry run ({weights:.1f} of them weights, "
            f"gradients and Adam); more for longer responses, up to optim.tokens_per_microbatch "
            f"({config.optim.tokens_per_microbatch:,}) at a time",
        ),
        (
            "time",
            f"about {duration(seconds)} a step and {duration(seconds * config.run.max_steps)} for "
            f"{config.run.max_steps} steps where every response is of {rollout.max_new_tokens} "
            "tokens; evaluations come on top",
        ),
        (
            "leaves",
            f"{trainer.journal.folder.path} (nothing yet: this was a dry run, and all is well)",
        ),
    ]


def _training_bytes(trainer: Trainer) -> int:
    """Weights, gradients and optimizer state after a step, of this process's part."""
    parameters: list[Tensor] = list(trainer.policy.decoder.parameters())
    gradients = [p for p in parameters if p.requires_grad]
    states = trainer.update.optimizer.state.values()
    moments = [t for state in states for t in state.values() if isinstance(t, Tensor)]
    tensors = parameters + gradients + moments
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def _peak_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
