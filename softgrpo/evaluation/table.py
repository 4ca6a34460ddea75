"""The results as people read them in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from softgrpo.evaluation.scores import Row, cell_key
from softgrpo.evaluation.tasks import task_label


def print_results(results: dict[str, Any], ks: Sequence[int]) -> None:
    """One line a cell, and soft - discrete at the same temperature below."""
    n = results["settings"]["samples"]
    speeds = {cell_key(row): row["tokens_per_second"] for row in results["speed"]}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task", overflow="ellipsis")
    table.add_column("mode", no_wrap=True)
    numbers = [f"mean@{n}", "95 %", *(f"pass@{k}" for k in ks), f"maj@{n}"]
    for name in ("T", "asked", *numbers, "length", "cut", "cand.", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for cell in results["cells"]:
        speed, effective = speeds[cell_key(cell)], cell["effective_candidates"]
        table.add_row(
            task_label(cell["task"]),
            cell["mode"],
            f"{cell['temperature']:g}",
            str(cell["questions"]),
            f"{cell['mean']['value']:.3f}",
            f"{cell['mean']['low']:.3f}-{cell['mean']['high']:.3f}",
            *(f"{cell['pass'][k - 1]['value']:.3f}" for k in ks),
            f"{cell['maj']['value']:.3f}" if cell["maj"] else "-",
            f"{cell['length']['mean']:.0f}",
            f"{cell['truncated']:.0%}",
            f"{effective:.2f}" if effective else "-",
            f"{speed:.0f}" if speed else "-",
        )
    console = _console()
    console.print(table)
    for row in results["soft_minus_discrete"]:
        place = f"{task_label(row['task'])}, T {row['temperature']:g}"
        console.print(f"soft - discrete  {place}:  {_changes(row, ks, n)}")
    console.print(_notes(results), style="dim")


def print_comparison(rows: Sequence[Row], ks: Sequence[int] | None) -> None:
    """A line for each pair of cells: A - B with its interval."""
    console = _console()
    console.print("A - B, mean over questions (95 % paired bootstrap over questions)")
    for row in rows:
        most = len(row["pass"])
        shown = ks or [most]
        if max(shown) > most:
            raise ValueError(f"--k {max(shown)} is more than the {most} samples that both have")
        (mode, temperature), theirs = row["ours"], row["theirs"]
        place = f"{task_label(row['task'])}, {row['questions']} questions, {mode} T {temperature:g}"
        if row["ours"] != theirs:
            place += f" - {theirs[0]} T {theirs[1]:g}"
        console.print(f"{place}:  {_changes(row, shown, None)}")


def _changes(row: Row, ks: Sequence[int], n: int | None) -> str:
    suffix = f"@{n}" if n else ""
    parts = [f"mean{suffix} {_signed(row['mean'])}"]
    parts += [f"pass@{k} {_signed(row['pass'][k - 1])}" for k in ks]
    if row["maj"]:
        parts.append(f"maj{suffix} {_signed(row['maj'])}")
    return ", ".join(parts)


def _signed(entry: Row) -> str:
    value, low, high = (round(entry[name], 3) + 0.0 for name in ("value", "low", "high"))  # no -0.0
    return f"{value:+.3f} ({low:+.3f} {high:+.3f})"


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160  # a file has no width: nothing is cut
    return console


def _notes(results: dict[str, Any]) -> str:
    kind = "unbiased pass@k" if results["estimator"] == "unbiased" else "pass@k of the first k"
    said = f"{kind}; 95 % bootstrap intervals over questions; cand.: effective candidates"
    lost = sum(cell["lost"] for cell in results["cells"])
    return said + (f"; {lost} samples whose grader was killed count as wrong" if lost else "")
