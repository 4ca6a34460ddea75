"""What a run writes down and shows while it goes on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from softgrpo.config import Config
from softgrpo.distributed import World
from softgrpo.log.health import HealthWatch
from softgrpo.log.progress import TrainProgress
from softgrpo.log.samples import sample_rows
from softgrpo.log.tracking import Tracking
from softgrpo.report import build_report
from softgrpo.rollout.scored import ScoredRollout
from softgrpo.run.folder import RunFolder


class Journal:
    """The rows of a run: in its folder, in the services of `log.report_to`, on the terminal, and
    judged by the health watch. Of several processes the first one writes and shows.

    Raises ConfigError for a service whose library is missing. Nothing is written before `open`.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.config = config
        self.is_first = world.is_first
        self.folder = RunFolder(Path(config.run.output_dir) / config.run.name, world)
        self.tracking = Tracking(config.log.report_to if self.is_first else [])
        self.progress = TrainProgress(None if self.is_first else Console(quiet=True))
        self.health = HealthWatch(config.health.window)

    def open(self, last_step: int, *, is_resumed: bool) -> None:
        """Takes up the rows of the steps up to `last_step`; those of a new run are dropped."""
        self.folder.truncate_after(last_step if is_resumed else -1)
        for row in self.folder.step_rows():
            self.health.observe(row)
        run = self.config.run
        self.tracking.start(self.folder.path, run.name, asdict(self.config), last_step + 1)

    def record(self, row: dict[str, Any]) -> None:
        """Writes down a row of metrics.jsonl."""
        self.folder.append_metrics(row)
        self.tracking.log(row)

    def step(self, row: dict[str, Any]) -> None:
        """Writes down and shows the row of a training step, with warnings where it goes wrong."""
        self.record(row)
        self.progress.step(row)
        for warning in self.health.observe(row):
            self.progress.message(f"warning: {warning.text}")

    def evaluation(self, row: dict[str, Any]) -> None:
        """Writes down and shows the row of a held-out evaluation."""
        self.record(row)
        self.progress.evaluation(row)

    def samples(
        self,
        scored: ScoredRollout,
        advantages_S: Tensor | None,
        *,
        step: int,
        phase: str,
        tau: float,
        tokenizer: Any,
    ) -> None:
        """Keeps `log.samples_per_step` of the samples for the report; shows those of training."""
        rows = sample_rows(
            scored,
            advantages_S,
            self.config.log.samples_per_step,
            step=step,
            phase=phase,
            tau=tau,
            tokenizer=tokenizer,
        )
        self.folder.append_samples(rows)
        if phase == "train":
            for row in rows:
                self.progress.sample(row)

    @property
    def has_given_up(self) -> bool:
        """Whether the run went wrong and is to end for it."""
        return self.config.health.stop and self.health.collapsed

    def build_report(self) -> None:
        if self.is_first:
            build_report(self.folder.path)

    def close(self) -> None:
        """The last report; the services end the run."""
        self.build_report()
        self.tracking.close()
