"""Tables and figures of the cells that are done.

    python benchmarks/learning/analyse.py --json benchmarks/learning/results.json

Prints the tables of README.md in Markdown and draws the reward curves and pass@k beside the
JSON, which holds every number of them. Cells that were not run are listed as missing.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
import torch
from cells import CELLS, HERE, MAIN, SAMPLES, is_done, read_training
from grid import print_tables as print_grid
from scoring import format_free

from softgrpo.evaluation.results import compare_results, read_results

sys.path.insert(1, str(HERE.parent))
from _machine import hardware, versions

WINDOW = 10  # steps


def read_scores(folder: Path, mode: str) -> dict[str, Any]:
    """What the evaluation of a folder says of one mode."""
    results = read_results(folder / "evaluation")
    (scores,) = (c for c in results["cells"] if c["mode"] == mode)
    questions = [row for row in results["results"] if row["mode"] == mode]
    free = [format_free(s["text"], q["gold"]) for q in questions for s in q["samples"]]
    return {
        "mode": mode,
        "format_free": mean(free),
        "length": scores["length"]["mean"],
        **{k: scores[k] for k in ("mean", "pass", "maj", "truncated", "effective_candidates")},
    }


def read_all(root: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of all that is done, and the names of what is missing."""
    rows, missing = [], []
    for task in dict.fromkeys(cell.task for cell in CELLS):
        start = root / task / "format-0"
        if is_done(start):
            rows += [
                {"cell": f"{task}/start, {mode}", **read_scores(start, mode)}
                for mode in ("discrete", "soft")
            ]
    for cell in CELLS:
        folder = root / cell.path
        if is_done(folder):
            scores, training = read_scores(folder, cell.mode), read_training(folder)
            rows.append({"cell": cell.path, "overrides": cell.overrides, **scores, **training})
        else:
            missing.append(cell.path)
    return rows, missing


def differences(root: Path) -> list[dict[str, Any]]:
    """Soft minus discrete of the same seed, paired by question."""
    rows = []
    for cell in CELLS:
        pair = [root / cell.task / f"{name}-{cell.seed}" for name in (cell.name, "discrete")]
        if cell.mode == "soft" and all(map(is_done, pair)):
            ours, theirs = (read_results(folder / "evaluation") for folder in pair)
            (change,) = compare_results(ours, theirs, "unbiased")
            rows.append({"cell": cell.path, **{k: change[k] for k in ("mean", "pass", "maj")}})
    return rows


def interval(entry: dict[str, float], sign: str = "") -> str:
    return f"{entry['value']:{sign}.3f} [{entry['low']:{sign}.3f}, {entry['high']:{sign}.3f}]"


def print_tables(rows: list[dict[str, Any]], changes: list[dict[str, Any]]) -> None:
    print("| cell | mean@32 | pass@32 | maj@32 | format-free | length | effective candidates |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        effective = row["effective_candidates"]
        print(
            f"| {row['cell']} | {interval(row['mean'])} | {interval(row['pass'][-1])} | "
            f"{row['maj']['value']:.3f} | {row['format_free']:.3f} | {row['length']:.1f} | "
            f"{f'{effective:.2f}' if effective else ''} |"
        )
    print("\n| cell | reward, first and last 10 steps | mismatch | gradient norm | tokens |")
    print("|---|---|---|---|---|")
    for row in rows:
        if "steps" in row:
            trends = (_trend(row[name]) for name in ("reward", "mismatch", "grad_norm"))
            print(f"| {row['cell']} | {' | '.join(trends)} | {row['tokens']} |")
    print("\n| minus discrete, same seed | mean@32 | pass@32 | maj@32 |")
    print("|---|---|---|---|")
    for row in changes:
        shown = (interval(entry, "+") for entry in (row["mean"], row["pass"][-1], row["maj"]))
        print(f"| {row['cell']} | {' | '.join(shown)} |")


def _trend(series: list[float | None]) -> str:
    values = [value for value in series if value is not None]
    return f"{mean(values[:WINDOW]):.3f} -> {mean(values[-WINDOW:]):.3f}" if values else ""


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Of the easy task: reward of training and held-out pass@k of the main rows over seeds; below,
    reward and mismatch of the runs that broke."""
    figure, ((curves, passes), (broken, mismatch)) = plt.subplots(
        2, 2, figsize=(10, 6.6), layout="constrained"
    )
    for name, colour in zip(MAIN, ("#c2571a", "#0b6e99", "#2a8c4a", "#8450a8"), strict=True):
        seeds = [r for r in rows if re.fullmatch(rf"easy/{name}-\d", r["cell"])]
        for row in seeds:
            curves.plot(*_smooth(row["reward"]), color=colour, alpha=0.35, lw=1)
        if seeds:
            overall = [mean(rewards) for rewards in zip(*(r["reward"] for r in seeds), strict=True)]
            curves.plot(*_smooth(overall), color=colour, lw=2, label=name)
            values = [mean(r["pass"][k]["value"] for r in seeds) for k in range(SAMPLES)]
            label = f"{name} ({len(seeds)} seeds)"
            passes.plot(range(1, SAMPLES + 1), values, color=colour, lw=2, label=label)
        for row in (r for r in rows if r["cell"] == f"easy/{name}-lr-1e-4-0"):
            broken.plot(*_smooth(row["reward"]), color=colour, lw=2, label=f"{name}, lr 1e-4")
            mismatch.plot(*_smooth(row["mismatch"]), color=colour, lw=2, label=f"{name}, lr 1e-4")
    for row in (r for r in rows if r["cell"].startswith("easy/start")):
        dash = "--" if row["mode"] == "soft" else ":"
        values = [entry["value"] for entry in row["pass"]]
        passes.plot(range(1, SAMPLES + 1), values, dash, color="#777", label=row["cell"][5:])
    curves.set(xlabel="step", ylabel=f"reward, mean of {WINDOW} steps")
    broken.set(xlabel="step", ylabel=f"reward, mean of {WINDOW} steps")
    mismatch.set(xlabel="step", ylabel="engine - trainer, mean |log p|", ylim=(0, None))
    passes.set(xlabel="k", ylabel="held-out pass@k", xscale="log")
    passes.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"], minor=False)
    passes.minorticks_off()
    for axes in (curves, passes, broken, mismatch):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path)


def _smooth(series: list[float | None]) -> tuple[list[float], list[float]]:
    """(steps, means) of windows that overlap by half."""
    starts = range(0, len(series) - WINDOW + 1, WINDOW // 2)
    windows = [[v for v in series[i : i + WINDOW] if v is not None] for i in starts]
    return [i + WINDOW / 2 for i in starts], [mean(w) if w else 0.0 for w in windows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows, missing = read_all(arguments.runs)
    changes = differences(arguments.runs)
    print_tables(rows, changes)
    print_grid()
    print(f"\nmissing: {', '.join(missing) or 'nothing'}")
    if arguments.json:
        facts = {"hardware": hardware(torch.device("cpu")), "versions": versions()}
        result = {**facts, "missing": missing, "rows": rows, "minus_discrete": changes}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
        draw(rows, arguments.json.with_suffix(".svg"))


if __name__ == "__main__":
    main()
