"""A run around its training steps: begun or resumed, evaluated, saved, finished."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from softgrpo.config import Config
from softgrpo.data.training import TrainingData
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
from softgrpo_engine.model.decoder import Decoder


@dataclass
class RunState:
    """How far a run has come: what a checkpoint holds beside weights and optimizer."""

    step: int = 0
    rounds: int = 0  # of prompts, drawn so far; more than steps with dynamic sampling
    num_tokens: int = 0

    def is_due(self, every: int) -> bool:
        """Whether what is done every so many steps (0: never) is done after this one."""
        return every > 0 and self.step % every == 0


@dataclass(frozen=True)
class Session:
    """What a run does before, between and after the steps of its trainer.

    state is the trainer's too; a resume sets it. model_path: what the model was read from.
    """

    journal: Journal
    state: RunState
    data: TrainingData
    rewards: RewardRunner
    model_path: Path
    llm: RolloutEngine
    update: Update

    @property
    def config(self) -> Config:
        return self.journal.config

    @property
    def decoder(self) -> Decoder:
        return self.update.policy.decoder

    @property
    def is_over(self) -> bool:
        return self.state.step >= self.config.run.max_steps or self.journal.has_given_up

    def start(self) -> None:
        """Continues from the checkpoint found, or begins a new run folder."""
        config, journal = self.config, self.journal
        journal.folder.create(config.to_yaml())
        if journal.checkpoint is not None:
            self._resume(journal.checkpoint)
        if self.data.too_long:
            limit = f"longer than {config.data.max_prompt_tokens} tokens"
            journal.progress.message(f"left out {self.data.too_long} training prompts {limit}")
        journal.open(self.state.step)
        if journal.checkpoint is None and config.eval.before_train and self.data.held_out:
            self._evaluate()
        journal.progress.start(config.run.max_steps, self.state.step, config.run.name)

    def after_step(self, row: dict[str, Any]) -> None:
        """Records the row of a step; evaluates and saves where that is due."""
        self.journal.step(row)
        if self.state.is_due(self.config.eval.every):
            self._evaluate()
        if self.state.is_due(self.config.checkpoint.every):
            self._save()
            self.journal.build_report()

    def end_early(self, signal_number: int) -> NoReturn:
        """Saves what there is and raises Interrupted."""
        self._save_if_new()
        self._close()
        raise Interrupted(signal_number, self.state.step, self.config.run.max_steps)

    def finish(self) -> None:
        """The last checkpoint, the held-out result, the exported model and the report."""
        self._save_if_new()
        # A run that went wrong ends with the best model that it had.
        if self.journal.has_given_up:
            self._return_to_best()
        wanted = self.config.eval.after_train and bool(self.data.held_out)
        if wanted and not self.journal.folder.has_evaluation(self.state.step):
            self._evaluate()
        self._export()
        self._close()

    def _resume(self, checkpoint: Path) -> None:
        """Loads the checkpoint; with `run.resume=auto` the one before it where it is damaged."""
        journal, folder = self.journal, self.journal.folder
        paths = [checkpoint]
        if self.config.run.resume == "auto":
            paths = [folder.checkpoint(step) for step in folder.checkpoint_steps()[::-1]]
        say, optimizer = journal.progress.message, self.update.optimizer
        path, damaged, saved = load_newest(paths, self.decoder, optimizer, say)
        if journal.world.is_first:
            set_aside(damaged)
        self.state.step, self.state.num_tokens = saved["step"], saved["num_tokens"]
        self.state.rounds = saved["rounds"]
        self._sync(saved["weight_version"])
        say(f"continuing after step {self.state.step}: {path}")

    def _return_to_best(self) -> None:
        """Takes the weights of the best checkpoint for what follows the last step."""
        journal, folder = self.journal, self.journal.folder
        best = journal.health.best(folder.checkpoint_steps())
        saved = load_checkpoint(folder.checkpoint(best), self.decoder, self.update.optimizer)
        self._sync(saved["weight_version"])
        journal.progress.message(
            f"stopped after step {self.state.step} (health.stop); the model is that of step {best}"
        )
        self.state.step = best
        journal.record({"step": best, "summary/model_of_step": best})

    def _sync(self, version: int) -> None:
        self.llm.update_weights(merged_tensors(self.decoder), version=version)

    def _save_if_new(self) -> None:
        if self.journal.folder.latest_step() != self.state.step:
            self._save()

    def _save(self) -> None:
        config, state, folder = self.config, self.state, self.journal.folder
        best = None
        if config.health.stop:
            best = self.journal.health.best([*folder.checkpoint_steps(), state.step])
        saved = {
            "rounds": state.rounds,
            "num_tokens": state.num_tokens,
            "weight_version": self.llm.weight_version,
        }
        optimizer, keep = self.update.optimizer, config.checkpoint.keep
        folder.save_checkpoint(state.step, self.decoder, optimizer, saved, keep, best)

    def _evaluate(self) -> None:
        config, step = self.config, self.state.step
        self.journal.progress.phase("eval")
        scored = evaluate(self.llm, self.data, self.rewards, config, self.journal.world)
        self.journal.evaluation(
            evaluation_row(step, scored.outputs, scored.rewards_S, config.eval.k)
        )
        mixture, tokenizer = evaluation_rollout(config).soft.mixture, self.llm.tokenizer
        self.journal.samples(
            scored, None, step=step, phase="eval", mixture=mixture, tokenizer=tokenizer
        )

    def _export(self) -> None:
        """The model, and with adapters what peft loads."""
        config, folder, world = self.config, self.journal.folder, self.journal.world
        if config.lora.rank:
            adapter = folder.path / "adapter"
            export_adapter(self.decoder, config.model.path, adapter, write=world.is_first)
        if config.checkpoint.export_hf:
            export_model(
                merged_tensors(self.decoder),
                self.model_path,
                folder.model,
                soft_params(config.rollout, config.algorithm.objective),
                world,
            )

    def _close(self) -> None:
        self.journal.close()
        self.journal.world.leave()
