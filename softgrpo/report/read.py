"""What a run folder holds, read so that a killed or damaged run still gives a report."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from softgrpo.log.files import dotted, number

Row = dict[str, Any]


# A report should open at once, so of larger files only evenly spread samples go into it.
_SAMPLES_BYTES = 16 * 2**20


@dataclass
class Run:
    """One run as it lies on the disk.

    steps: the training rows, ascending; evals: rows with ``eval/`` names; summary: the merged
    ``summary/`` rows; samples_every: of the samples on disk, one in so many is in ``samples``;
    unreadable: lines that are not JSON objects (a cut last line is not counted).
    """

    name: str
    config: dict[str, Any]
    config_text: str
    steps: list[Row] = field(default_factory=list)
    evals: list[Row] = field(default_factory=list)
    summary: Row = field(default_factory=dict)
    samples: list[Row] = field(default_factory=list)
    samples_every: int = 1
    unreadable: int = 0

    def setting(self, dotted: str, default: Any = None) -> Any:
        """A value of the resolved config, by dotted key."""
        value: Any = self.config
        for part in dotted.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value


def read_run(run_dir: Path, *, samples: bool = True) -> Run:
    """Reads ``metrics.jsonl`` and what else there is of config.yaml and samples.jsonl.

    Raises ValueError when the folder or its metrics.jsonl does not exist.
    """
    run_dir = Path(run_dir)
    metrics = run_dir / "metrics.jsonl"
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is not a folder; give the folder of a run, like runs/demo")
    if not metrics.is_file():
        raise ValueError(f"{run_dir} holds no run: there is no metrics.jsonl in it")
    config, text = _read_config(run_dir / "config.yaml")
    run = Run(run_dir.resolve().name, config, text)
    run.name = str(run.setting("run.name") or run.name)
    _read_metrics(run, metrics)
    path = run_dir / "samples.jsonl"
    if samples and path.is_file():
        run.samples_every = max(1, math.ceil(path.stat().st_size / _SAMPLES_BYTES))
        run.samples = list(_rows(run, path, run.samples_every))
    return run


def config_differences(run: Run, other: Run) -> list[tuple[str, str, str]]:
    """(dotted key, value in run, value in other) where they differ; "-" where a run lacks it."""
    ours, theirs = _settings(run), _settings(other)
    pairs = [(key, ours.get(key, "-"), theirs.get(key, "-")) for key in {**ours, **theirs}]
    return [(key, a, b) for key, a, b in pairs if a != b]


def _settings(run: Run) -> dict[str, str]:
    values = dotted(run.config).items()
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values}


def _read_metrics(run: Run, path: Path) -> None:
    """Sorts the rows into training steps, evaluations and summary."""
    steps: dict[float, Row] = {}
    for row in _rows(run, path):
        step = number(row.get("step"))
        if any(key.startswith("summary/") for key in row):
            run.summary |= {key: v for key, v in row.items() if key.startswith("summary/")}
        elif step is None:
            run.unreadable += 1
        elif any(key.startswith("eval/") for key in row):
            run.evals.append(row)
        else:
            steps[step] = row
    run.steps = [steps[step] for step in sorted(steps)]
    run.evals.sort(key=lambda row: float(row["step"]))


def _read_config(path: Path) -> tuple[dict[str, Any], str]:
    if not path.is_file():
        return {}, ""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        config = None
    return (config if isinstance(config, dict) else {}), text


def _rows(run: Run, path: Path, every: int = 1) -> Iterator[Row]:
    """The JSON objects of a jsonl file, one line in ``every``; counts what cannot be read."""
    with path.open("rb") as file:
        for index, line in enumerate(file):
            if index % every or not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8", errors="replace"))
            except ValueError:
                row = None
            if isinstance(row, dict):
                yield row
            elif line.endswith(b"\n"):  # else the run was killed while it wrote this line
                run.unreadable += 1
