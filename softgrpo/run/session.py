"""A run around its training steps: begun or resumed, evaluated, saved, finished."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softgrpo.config import Config
from softgrpo.data.training import TrainingData
from softgrpo.distributed import World
from softgrpo.learner.lora import merged_tensors
from softgrpo.learner.update import Update
from softgrpo.rewards import RewardRunner
from softgrpo.rollout.engines import RolloutEngine
from softgrpo.rollout.sampling import soft_params
from softgrpo.run.checkpoint import load_checkpoint, load_newest, set_aside
from softgrpo.run.export import export_adapter, export_model
from softgrpo.run.held_out import evaluate, evaluation_rollout, evaluation_row
from softgrpo.run.interrupt import Interrupted
from softgrpo.run.journal import Journal


@dataclass
class RunState:
    """How far a run has come; with the weights and the optimizer, all that a checkpoint holds."""

    step: int = 0
    rounds: int = 0  # of prompts, drawn so far; more than steps with dynamic sampling
    num_tokens: int = 0

    def is_due(self, every: int) -> bool:
        """Whether what happens every so many steps (0: never) happens after this one."""
        return every > 0 and self.step % every == 0


class Session:
    """Everything that a run does beside its steps; their trainer calls it in between.

    checkpoint: what it continues, None for a new run. state: the trainer's, which a resume sets.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        journal: Journal,
        checkpoint: Path | None,
        state: RunState,
        data: TrainingData,
        rewards: RewardRunner,
        llm: RolloutEngine,
        update: Update,
    ) -> None:
        self.config, self.world = config, world
        self.journal, self.folder = journal, journal.folder
        self.checkpoint, self.state = checkpoint, state
        self.data, self.rewards = data, rewards
        self.llm, self.update = llm, update
        self.decoder = update.policy.decoder
