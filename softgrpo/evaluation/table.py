"""The results as people read them in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from softgrpo.evaluation.scores import Row, cell_key
from softgrpo.evaluation.tasks import task_label
from softgrpo.evaluation.thoughts import OWN, thoughts_label


def print_results(results: dict[str, Any], ks: Sequence[int]) -> None:
    """One line a cell, and soft - discrete at the same temperature below."""
    n = results["settings"]["samples"]
    speeds = {cell_key(row): row["tokens_per_second"] for row in results["speed"]}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task", no_wrap=True)
    table.add_column("mode", no_wrap=True)
    scores = [f"mean@{n}", "95 %", *(f"pass@{k}" for k in ks), f"maj@{n}"]
    for name in ("T", "of", *scores, "len", "cut", "cand", "tok/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for cell in results["cells"]:
        speed, effective = speeds[cell_key(cell)], cell["effective_candidates"]
        table.add_row(
            Text(task_label(cell["task"])),  # a file's name may look like markup
            cell["mode"],
            f"{cell['temperature']:g}",
            str(cell["questions"]),
            f"{cell['mean']['value']:.3f}",
            f"{cell['mean']['low']:.2f}-{cell['mean']['high']:.2f}",
            *(f"{cell['pass'][k - 1]['value']:.3f}" for k in ks),
            f"{cell['maj']['value']:.3f}" if cell["maj"] else "-",
            f"{cell['length']['mean']:.0f}",
            f"{cell['truncated']:.0%}",
            f"{effective:.2f}" if effective else "-",
            f"{speed:.0f}" if speed else "-",
        )
    console = Console(highlight=False)
    # A wide table is wrapped by a narrow terminal; columns would be cut to nothing.
    natural = Measurement.get(console, console.options.update(width=1000), table).maximum
    console.width = max(console.width, natural)
    console.print(table)
    for row in results["soft_minus_discrete"]:
        place = f"{task_label(row['task'])}, T {row['temperature']:g}"
        console.print(
            f"soft - discrete, {place}: {_changes(row, ks, n)}", soft_wrap=True, markup=False
        )
    console.print(_notes(results), style="dim", soft_wrap=True)


def print_comparison(rows: Sequence[Row], ks: Sequence[int] | None) -> None:
    """A line for each pair of cells: A - B with its interval."""
    console = Console(highlight=False)
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
        console.print(f"{place}: {_changes(row, shown, None)}", soft_wrap=True, markup=False)


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


def _notes(results: dict[str, Any]) -> str:
    kind = "unbiased pass@k" if results["estimator"] == "unbiased" else "pass@k of the first k"
    said = (
        f"of: questions; 95 %: bootstrap over questions; {kind}; len: mean tokens; cut: share at "
        "the token limit; cand: effective candidates of a soft position"
    )
    if results["settings"]["thoughts"] != OWN:
        said += f"; thoughts: {thoughts_label(results['settings'])}"
    lost = sum(cell["lost"] for cell in results["cells"])
    return said + (f"; {lost} samples whose grader was killed count as wrong" if lost else "")
