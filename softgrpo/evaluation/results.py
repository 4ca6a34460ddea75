"""results.json: the numbers and every sample; and the comparison of two of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from softgrpo.evaluation.folder import Settings
from softgrpo.evaluation.scores import (
    Estimator,
    Row,
    cell_key,
    cell_summary,
    compare_cells,
    group_cells,
)


def build_results(
    rows: Sequence[Row], settings: Settings, graders: Mapping[str, str], estimator: Estimator
) -> dict[str, Any]:
    """The content of results.json.

    rows: all lines of samples.jsonl. graders: by task name. All but "speed" follows from the
    settings, whether the command ran through or was killed and resumed.
    """
    cells = group_cells(rows)
    order = {key: i for i, key in enumerate(_grid(settings))}
    cells = {key: cells[key] for key in sorted(cells, key=order.__getitem__)}

    def votes(task: str) -> bool:
        return graders[task] != "code"

    differences = []
    for (task, mode, temperature), mine in cells.items():
        other = cells.get((task, "discrete", temperature))
        if mode == "soft" and other is not None:
            change = compare_cells(mine, other, estimator, votes=votes(task))
            differences.append({"task": task, "temperature": temperature, **change})
    kept = ("task", "mode", "temperature", "question", "prompt", "gold", "samples")
    return {
        "softgrpo": version("softgrpo"),
        "settings": settings.to_dict(),
        "graders": dict(graders),
        "estimator": estimator,
        "cells": [cell_summary(r, estimator, votes=votes(k[0])) for k, r in cells.items()],
        "soft_minus_discrete": differences,
        "results": [{name: row[name] for name in kept} for r in cells.values() for row in r],
        "speed": [_speed(cell) for cell in cells.values()],
    }


def _grid(settings: Settings) -> list[tuple[str, str, float]]:
    return [
        (task, mode, temperature)
        for task in settings.tasks
        for mode in settings.modes
        for temperature in settings.temperatures
    ]


def _speed(rows: Sequence[Row]) -> Row:
    """Tokens of the finished questions by the time that went into them."""
    task, mode, temperature = cell_key(rows[0])
    tokens = sum(sample["tokens"] for row in rows for sample in row["samples"])
    seconds = sum(row["seconds"] for row in rows)
    return {
        "task": task,
        "mode": mode,
        "temperature": temperature,
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
    }


def read_results(path: Path) -> dict[str, Any]:
    """Reads a results.json, or that of an evaluation's folder; raises ValueError, one line."""
    file = path / "results.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"no such file: {file}; give the results.json of two evaluations")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        found = {"results", "graders", "settings"} <= set(results)
    except (ValueError, TypeError):
        found = False
    if not found:
        raise ValueError(f"{file} is not a results.json of softgrpo-eval")
    return dict(results)


def compare_results(
    ours: dict[str, Any], theirs: dict[str, Any], estimator: Estimator
) -> list[Row]:
    """ours - theirs for every cell that both have.

    Where a task is in each of them in one mode and temperature only, these two are compared, also
    when they differ. Raises ValueError when nothing can be compared or the questions differ.
    """
    mine, yours = group_cells(ours["results"]), group_cells(theirs["results"])
    pairs = [(key, key) for key in mine if key in yours]
    for task in dict.fromkeys(key[0] for key in mine):
        a, b = [k for k in mine if k[0] == task], [k for k in yours if k[0] == task]
        if len(a) == len(b) == 1 and a != b:
            pairs.append((a[0], b[0]))
    if not pairs:
        raise ValueError(
            f"nothing to compare: the first has {_names(mine)}, the second {_names(yours)}"
        )
    return [
        {
            "task": a[0],
            "ours": a[1:],
            "theirs": b[1:],
            "questions": len(mine[a]),
            **compare_cells(mine[a], yours[b], estimator, votes=ours["graders"][a[0]] != "code"),
        }
        for a, b in pairs
    ]


def _names(cells: dict[tuple[str, str, float], Any]) -> str:
    return ", ".join(f"{task} {mode} T {temperature:g}" for task, mode, temperature in cells)
