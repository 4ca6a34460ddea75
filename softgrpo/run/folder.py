"""The folder of a run: what is in it, and that a killed run leaves it consistent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from softgrpo.config import ConfigError, ConfigFile
from softgrpo.distributed import World
from softgrpo.log.files import (
    append_jsonl,
    dotted,
    json_line,
    read_jsonl,
    saving,
    sync,
    write_atomically,
)
from softgrpo.run.checkpoint import STATE_FILE, write_tensors


class RunFolder:
    """config.yaml, metrics.jsonl, samples.jsonl, checkpoints/ and model/ of one run.

    All processes of a run see it, the first one writes; all write their parts of a checkpoint.
    """

    def __init__(self, path: str | Path, world: World | None = None) -> None:
        self.path = Path(path)
        self.world = world or World()
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"

    def holds_a_run(self) -> bool:
        return self.config.exists() or self.metrics.exists()

    def create(self, config_yaml: str) -> None:
        """Makes the folder and writes the resolved config, when all processes have looked for an
        older run."""
        self.world.wait()
        if self.world.is_first:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomically(self.config, config_yaml)

    def append_metrics(self, row: dict[str, Any]) -> None:
        if self.world.is_first:
            append_jsonl(self.metrics, [row])

    def step_rows(self) -> list[dict[str, Any]]:
        """The rows of training steps, without those of evaluations."""
        return [row for row in self._rows() if "reward" in row]

    def has_evaluation(self, step: int) -> bool:
        """Whether the metrics hold a held-out evaluation of that step."""
        rows = self._rows()
        return any(r["step"] == step and any(k.startswith("eval/") for k in r) for r in rows)

    def _rows(self) -> list[dict[str, Any]]:
        return read_jsonl(self.metrics) if self.metrics.exists() else []

    def append_samples(self, rows: Iterable[dict[str, Any]]) -> None:
        if self.world.is_first:
            append_jsonl(self.samples, rows)

    def truncate_after(self, step: int) -> None:
        """Drops the rows that a killed run wrote after its last checkpoint."""
        for file in (self.metrics, self.samples):
            if self.world.is_first and file.exists():
                kept = [row for row in read_jsonl(file) if row.get("step", step + 1) <= step]
                write_atomically(file, "".join(json_line(row) for row in kept))
        self.world.wait()

    def checkpoint_steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        paths = self.checkpoints.glob("step_*") if self.checkpoints.exists() else []
        complete = [
            path for path in paths if path.suffix != ".tmp" and (path / STATE_FILE).exists()
        ]
        return sorted(int(path.name.removeprefix("step_")) for path in complete)

    def latest_step(self) -> int:
        """Step of the newest complete checkpoint, 0 when there is none."""
        return max(self.checkpoint_steps(), default=0)

    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint, None when there is none."""
        step = self.latest_step()
        return self.checkpoint(step) if step else None

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:06d}"

    @saving("the checkpoint")
    def save_checkpoint(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        keep: int,
        best: int | None = None,
    ) -> Path:
        """Writes ``checkpoints/step_NNNNNN`` and removes all but the newest ``keep`` and that of
        step ``best``.

        The checkpoint appears by one rename after everything in it has reached the disk, so that a
        kill at any moment leaves the previous one or this one, never half of one.
        """
        target = self.checkpoint(step)
        temporary = target.with_suffix(".tmp")
        if self.world.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.world.wait()
        write_tensors(temporary, model, optimizer)
        self.world.wait()
        if self.world.is_first:
            (temporary / STATE_FILE).write_text(
                json.dumps({"step": step, **state}, indent=2) + "\n"
            )
            sync(temporary / STATE_FILE)
            sync(temporary)
            if target.exists():
                shutil.rmtree(target)
            os.replace(temporary, target)
            sync(self.checkpoints)
            for old in self.checkpoint_steps()[:-keep]:
                if old != best:
                    shutil.rmtree(self.checkpoint(old))
        self.world.wait()
        return target


# What may differ between the run that wrote a checkpoint and the one that continues it.
_FREE_TO_CHANGE = (
    "run.max_steps",
    "run.resume",
    "run.output_dir",
    "run.timeout_s",
    "run.deterministic",
    "rollout.sleep",
    "checkpoint.",
    "log.",
    "eval.",
    "health.",
)


def find_checkpoint(folder: RunFolder, config: ConfigFile) -> Path | None:
    """The checkpoint that ``run.resume`` names, None for a new run.

    Raises ConfigError when another run than that of the folder would begin in it, when there is no
    such checkpoint, or when the run that wrote it was configured differently.
    """
    resume = config.run.resume
    if resume == "none":
        if folder.holds_a_run():
            raise ConfigError(
                f"{folder.path} already holds a run: continue it with run.resume=auto, "
                "or choose another run.name"
            )
        return None
    if resume == "auto":
        latest = folder.latest_checkpoint()
        if folder.config.exists():
            then = type(config).load(folder.config)
            _check_same_run(then, config, folder.config)
            if latest is None and then.run.resume not in ("none", "auto"):
                raise ConfigError(
                    f"{folder.path} began from {then.run.resume} and ended before its first "
                    "checkpoint: begin again from there under another run.name"
                )
        return latest
    path = Path(resume)
    if not (path / STATE_FILE).exists():
        raise ConfigError(f"run.resume: {resume!r} is no checkpoint (it has no {STATE_FILE})")
    if folder.holds_a_run():
        # Its later checkpoints and its rows are not of the branch, and `auto` could not tell.
        raise ConfigError(
            f"{folder.path} already holds a run: begin one from {resume} under another run.name, "
            "or continue that one with run.resume=auto"
        )
    return path


def _check_same_run(then: ConfigFile, now: ConfigFile, path: Path) -> None:
    before, after = dotted(asdict(then)), dotted(asdict(now))
    for key in before:
        if before[key] != after.get(key) and not key.startswith(_FREE_TO_CHANGE):
            raise ConfigError(
                f"{key} was {before[key]!r} in {path} and is {after.get(key)!r} now: resume with "
                "the same settings, or choose another run.name"
            )
