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
from softgrpo.log.samples import Mixture, sample_rows
from softgrpo.log.tracking import Tracking
from softgrpo.report import build_report
from softgrpo.rollout.scored import ScoredRollout
from softgrpo.run.folder import RunFolder, find_checkpoint


class Journal:
    """The rows of a run: in its folder, in the services of `log.report_to` and on the terminal,
    judged by the health watch. Of several processes the first one writes and shows.

    checkpoint: what the run continues, None for a new one. The constructor writes nothing; it
    raises ConfigError for a folder or a checkpoint that cannot be used and a service that is not
    installed.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.folder = RunFolder(Path(config.run.output_dir) / config.run.name, world)
        self.checkpoint = find_checkpoint(self.folder, config)
        self.tracking = Tracking(config.log.report_to if world.is_first else [])
        self.progress = TrainProgress(None if world.is_first else Console(quiet=True))
        self.health = HealthWatch(config.health.window)

    def open(self, last_step: int) -> None:
        """Goes on after the row of a step, 0 for a new run; later rows are dropped."""
        self.folder.truncate_after(last_step if self.checkpoint else -1)
        for row in self.folder.step_rows():
            self.health.observe(row)
        name, config = self.config.run.name, asdict(self.config)
        self.tracking.start(self.folder.path, name, config, last_step + 1)

    def record(self, row: dict[str, Any]) -> None:
        """Writes down a row of metrics.jsonl."""
        self.folder.append_metrics(row)
        self.tracking.log(row)

    def step(self, row: dict[str, Any]) -> None:
        """Writes down and shows the row of a training step, and what is wrong with its trend."""
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
        mixture: Mixture,
        tokenizer: Any,
    ) -> None:
        """Keeps `log.samples_per_step` samples for the report; shows those of phase `train`."""
        rows = sample_rows(
            scored,
            advantages_S,
            self.config.log.samples_per_step,
            step=step,
            phase=phase,
            mixture=mixture,
            tokenizer=tokenizer,
        )
        self.folder.append_samples(rows)
        if phase == "train":
            for row in rows:
                self.progress.sample(row)

    @property
    def has_given_up(self) -> bool:
        """Whether the run went wrong and `health.stop` ends it for that."""
        return self.config.health.stop and self.health.collapsed

    def build_report(self) -> None:
        if self.world.is_first:
            build_report(self.folder.path)

    def close(self) -> None:
        """The last report; ends the run in the services."""
        self.build_report()
        self.tracking.close()
