"""Methods at three learning rates, a record of each cell in records/.

    python benchmarks/learning/experiment.py --grid              # all cells, resumable
    python benchmarks/learning/experiment.py --grid 'easy/*'     # of one task
    python benchmarks/learning/grid.py                           # tables, and a picture

A rate is chosen with seed 0, by the training reward of the last steps: the held-out questions have
no say in it. Seeds 1 and 2 run at that rate. A record is a JSON file, which is committed: the next
session goes on from there, on any machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from cells import CONCRETE, DISCRETE, HERE, SAMPLES, Cell

from softgrpo.evaluation.metrics import bootstrap_interval

RECORDS = HERE / "records"
# Of each task; small: of a model from scratch (small.py).
RATES = {
    "easy": ("5e-6", "1e-5", "2e-5"),
    "hard": ("5e-6", "1e-5", "2e-5"),
    "small": ("3e-5", "1e-4", "3e-4"),
}
LAST = 10  # steps whose reward chooses the rate
METHODS = {
    "discrete": DISCRETE,
    "concrete": CONCRETE,
    "censored": ("algorithm.objective=censored", "rollout.soft.weight_floor=0.1"),
    "argmax": ("algorithm.objective=argmax",),
    "multiplex-3": (
        "rollout.soft.noise=multiplex",
        "rollout.soft.noise_scale=3",
        "rollout.soft.tau=1.0",
        "algorithm.objective=per_slot",
    ),
}
TASKS = tuple(RATES)
SEEDS = 3


def cell_of(task: str, method: str, rate: str, seed: int) -> Cell:
    changes = (*METHODS[method], f"optim.lr={rate}")
    return Cell(task, f"grid-{method}-lr-{rate}", seed, changes)


def first_cells() -> list[Cell]:
    """Those of seed 0."""
    return [cell_of(task, m, rate, 0) for task in TASKS for m in METHODS for rate in RATES[task]]


def later_cells() -> list[Cell]:
    """The other seeds of every method whose rate is known."""
    return [
        cell_of(task, method, rate, seed)
        for task in TASKS
        for method in METHODS
        for seed in range(1, SEEDS)
        if (rate := best_rate(task, method)) is not None
    ]


def best_rate(task: str, method: str) -> str | None:
    """By the mean training reward of the last steps; None until all rates have run."""
    rows = {rate: read_record(cell_of(task, method, rate, 0)) for rate in RATES[task]}
    rewards = {rate: mean(row["reward"][-LAST:]) for rate, row in rows.items() if row is not None}
    return max(rewards, key=lambda rate: rewards[rate]) if len(rewards) == len(rows) else None


def record_path(cell: Cell) -> Path:
    return RECORDS / f"{cell.path.replace('/', '-')}.json"


def read_record(cell: Cell) -> dict[str, Any] | None:
    path = record_path(cell)
    return json.loads(path.read_text()) if path.exists() else None


def write_record(cell: Cell, machine: str, training: dict[str, Any], results: Any) -> None:
    """One line: what the log says step by step, and of each mode of the evaluation the scores, and
    by question how many samples are right and whether the majority is."""
    scores = {}
    for part in results["cells"]:
        rows = [row for row in results["results"] if row["mode"] == part["mode"]]
        rows.sort(key=lambda row: row["question"])
        scores[part["mode"]] = {
            **{key: part[key] for key in ("mean", "pass", "maj", "length", "effective_candidates")},
            "right": [sum(s["correct"] for s in row["samples"]) for row in rows],
        }
    row = {"cell": cell.path, "overrides": cell.overrides, "machine": machine, **training}
    RECORDS.mkdir(exist_ok=True)
    record_path(cell).write_text(json.dumps({**row, "scores": scores}) + "\n")


def print_tables() -> None:
    for task in TASKS:
        _print_rates(task)
        _print_best(task)


def _print_rates(task: str) -> None:
    print(f"\n| {task}, seed 0 | " + " | ".join(f"lr {rate}" for rate in RATES[task]) + " |")
    print("|---|" + "---|" * len(RATES[task]))
    for method in METHODS:
        rows = [read_record(cell_of(task, method, rate, 0)) for rate in RATES[task]]
        cells = [
            f"{mean(row['reward'][-LAST:]):.3f}, held out {_own(row)['mean']['value']:.3f}"
            if row
            else ""
            for row in rows
        ]
        print(f"| {method} | {' | '.join(cells)} |")


def _print_best(task: str) -> None:
    columns = "lr | mean@32 | pass@32 | maj@32 | fed discrete tokens | minus discrete"
    print(f"\n| {task}, at its rate | {columns} |")
    print("|---|---|---|---|---|---|---|")
    theirs = _best_rows(task, "discrete")
    for method in METHODS:
        rows = _best_rows(task, method)
        if not rows:
            continue
        own = [_own(row) for row in rows.values()]
        scores = (
            [s["mean"]["value"] for s in own],
            [s["pass"][-1]["value"] for s in own],
            [s["maj"]["value"] for s in own],
            [row["scores"]["discrete"]["mean"]["value"] for row in rows.values()],
        )
        rate = best_rate(task, method)
        shown = " | ".join(_of_seeds(values) for values in scores)
        print(f"| {method} | {rate} | {shown} | {_difference(rows, theirs)} |")


def _best_rows(task: str, method: str) -> dict[int, dict[str, Any]]:
    """By seed, those that are there."""
    rate = best_rate(task, method)
    found = {s: read_record(cell_of(task, method, rate, s)) for s in range(SEEDS) if rate}
    return {seed: row for seed, row in found.items() if row is not None}


def _own(row: dict[str, Any]) -> dict[str, Any]:
    """Scores with the kind of tokens that the model was trained with."""
    return row["scores"].get("soft", row["scores"]["discrete"])


def _of_seeds(values: list[float]) -> str:
    each = ", ".join(f"{value:.3f}" for value in values)
    return each if len(values) == 1 else f"{mean(values):.3f} ({each})"


def _difference(rows: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]]) -> str:
    """Of mean@n to the discrete run of the same seed, over the seeds both have, paired by
    question."""
    seeds = rows.keys() & theirs.keys()
    if not seeds or rows == theirs:
        return ""
    pairs = [(_own(rows[seed])["right"], _own(theirs[seed])["right"]) for seed in sorted(seeds)]
    by_seed = [[(a - b) / SAMPLES for a, b in zip(*pair, strict=True)] for pair in pairs]
    values = [mean(question) for question in zip(*by_seed, strict=True)]
    low, high = bootstrap_interval(values)
    return f"{mean(values):+.3f} [{low:+.3f}, {high:+.3f}]"


def draw() -> None:
    """mean@n of each method at its rate, by task, the seeds as dots; pass@n as open circles."""
    import matplotlib.pyplot as plt  # the runs need none

    tasks = [task for task in TASKS if _best_rows(task, "discrete")]
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(4.5 * len(tasks), 2.8), layout="constrained"
    )
    for panel, task in zip(np.atleast_1d(axes), tasks, strict=True):
        for place, method in enumerate(reversed(METHODS)):
            own = [_own(row) for row in _best_rows(task, method).values()]
            if not own:
                continue
            values = [scores["mean"]["value"] for scores in own]
            best = [scores["pass"][-1]["value"] for scores in own]
            colour = "#777" if method == "discrete" else "#0b6e99"
            panel.barh(place, mean(values), 0.6, color=colour, alpha=0.6)
            panel.plot(values, [place] * len(values), "o", ms=3, color="black")
            panel.plot(best, [place] * len(best), "o", ms=4, mfc="none", mec="black")
        panel.set_yticks(range(len(METHODS)), list(reversed(METHODS)))
        panel.set(title=task, xlabel=f"mean@{SAMPLES}; circles: pass@{SAMPLES}", xlim=(0, None))
        panel.grid(axis="x", alpha=0.3)
    figure.savefig(HERE / "grid.svg")


if __name__ == "__main__":
    print_tables()
    draw()
