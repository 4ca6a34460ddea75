"""The tables of the cells that are done, in Markdown, and their picture.

python benchmarks/learning/frontier/table.py
"""

from __future__ import annotations

import json
from collections import defaultdict
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
from arms import ARMS
from experiment import CELLS, HERE, best_rate

Scores = dict[str, dict[str, dict[str, float]]]


def cells() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(CELLS.glob("*.json"))]


def scores_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[Scores]]]:
    """By arm, then "before" and "after" reinforcement (at the arm's best rate): a seed each."""
    table: dict[str, dict[str, list[Scores]]] = {arm: defaultdict(list) for arm in ARMS}
    for row in rows:
        if "arm" not in row:
            for arm, scores in row["scores"].items():
                table[arm]["before"].append(scores)
        elif row["lr"] == best_rate(row["arm"]):
            table[row["arm"]]["after"].append(row["scores"])
    return table


def of_seeds(seeds: list[Scores], variant: str, score: str) -> str:
    """The mean over seeds, and each; the interval of the one where there is one."""
    found = [seed[variant][score] for seed in seeds if variant in seed]
    if not found:
        return ""
    values = [entry["value"] for entry in found]
    if len(found) == 1:
        return f"{values[0]:.3f} [{found[0]['low']:.3f}, {found[0]['high']:.3f}]"
    return f"{mean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})"


def print_tables(table: dict[str, dict[str, list[Scores]]]) -> None:
    for when in ("before", "after"):
        print(f"\n{when}\n\n| thoughts | mean@16 | maj@16 | pass@16 | argmax fed | filler fed |")
        print("|---|---|---|---|---|---|")
        for arm, phases in table.items():
            seeds = phases[when]
            own = [of_seeds(seeds, "own", score) for score in ("mean", "maj", "pass")]
            others = [of_seeds(seeds, variant, "mean") for variant in ("argmax", "filler")]
            print(f"| {arm} | {' | '.join([*own, *others])} |")


def draw(table: dict[str, dict[str, list[Scores]]]) -> None:
    """Accuracy of each arm before and after, with the seeds as dots."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for row, (_, phases) in enumerate(reversed(table.items())):
        for when, colour, shift in (("before", "#777", 0.15), ("after", "#0b6e99", -0.15)):
            values = [seed["own"]["mean"]["value"] for seed in phases[when]]
            if values:
                axes.barh(row + shift, mean(values), 0.3, color=colour, alpha=0.6)
                axes.plot(values, [row + shift] * len(values), "o", ms=3, color="black")
    axes.set(xlabel="held-out accuracy (chance 0.5); grey: taught, blue: reinforced", xlim=(0.4, 1))
    axes.set_yticks(range(len(table)), list(reversed(table)))
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(HERE / "results.svg")


if __name__ == "__main__":
    numbers = scores_of(cells())
    print_tables(numbers)
    draw(numbers)
