"""report.html of an evaluation: scores, curves, questions and samples in one offline file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from softgrpo.evaluation.folder import EvalFolder
from softgrpo.evaluation.scores import Row, cell_key
from softgrpo.evaluation.tasks import task_label
from softgrpo.evaluation.thoughts import thoughts_label
from softgrpo.log.files import write_atomically
from softgrpo.report.build import asset, fill_page
from softgrpo.report.embed import embed_json, pack_position

_SCRIPTS = ("dom.js", "charts.js", "token_view.js", "eval.js")
_BINS = 32
# A page should open at once, so of more positions only evenly spread questions keep theirs.
_POSITIONS = 250_000
_MOST_SENTENCES = 6
_COLUMNS = ("answered", "length", "cut", "soft", "candidates", "tokens/s")


def write_page(folder: EvalFolder, results: dict[str, Any]) -> None:
    """Writes report.html from results.json's content and the candidates in samples.jsonl."""
    settings = results["settings"]
    facts = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in _facts(settings)
    )
    parts = {
        "title": escape(settings["model"]),
        "style": asset("style.css") + asset("eval.css"),
        "words": escape(" ".join(_sentences(results))),
        "facts": facts,
        "note": escape(_note(results)),
        "table": _table_html(results),
        "settings": escape(json.dumps(settings, indent=1, ensure_ascii=False)),
        "data": embed_json(_data(results, folder.rows())),
        "script": "\n".join(asset(name) for name in _SCRIPTS),
    }
    write_atomically(folder.report, fill_page("eval.html", parts))


def _data(results: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """What eval.js reads: tasks with their questions, and cells with scores and samples."""
    names = results["settings"]["tasks"]
    by_cell: dict[Any, list[Row]] = {}
    for row in results["results"]:
        by_cell.setdefault(cell_key(row), []).append(row)
    edges = [_edges([r for k, rs in by_cell.items() if k[0] == name for r in rs]) for name in names]
    vocabulary: dict[str, int] = {}
    shown = _shown(rows, vocabulary)
    first = {name: next(rs for key, rs in by_cell.items() if key[0] == name) for name in names}
    return {
        "estimator": results["estimator"],
        "temperatures": results["settings"]["temperatures"],
        "tasks": [
            {
                "label": task_label(name),
                "edges": edges[i],
                "questions": [{"prompt": r["prompt"], "gold": r["gold"]} for r in first[name]],
            }
            for i, name in enumerate(names)
        ],
        "cells": [
            _cell(cell, by_cell[cell_key(cell)], names, edges, shown.get(cell_key(cell), {}))
            for cell in results["cells"]
        ],
        "vocabulary": list(vocabulary),
    }


def _cell(
    cell: Row, rows: Sequence[Row], names: list[str], edges: list[list[int]], shown: dict[int, Any]
) -> Row:
    task = names.index(cell["task"])
    counts, _ = np.histogram(_lengths(rows), bins=edges[task])
    return {
        "task": task,
        "mode": cell["mode"],
        "temperature": cell["temperature"],
        "label": f"{cell['mode']}, T {cell['temperature']:g}",
        "pass": {
            name: [round(entry[name], 5) for entry in cell["pass"]]
            for name in ("value", "low", "high")
        },
        "lengths": [round(float(share), 5) for share in counts / counts.sum()],
        "samples": [
            [
                [int(s["correct"]), s["answer"], s["tokens"], int(s["finish_reason"] == "length")]
                for s in row["samples"]
            ]
            for row in rows
        ],
        "shown": shown,
    }


def _shown(
    rows: Sequence[Row], vocabulary: dict[str, int]
) -> dict[tuple[str, str, float], dict[int, dict[int, Any]]]:
    """{cell: {question: {sample: packed positions}}}, thinned to a page that opens at once."""
    total = sum(len(sample["positions"]) for row in rows for sample in row["shown"])
    every = max(1, math.ceil(total / _POSITIONS))
    found: dict[tuple[str, str, float], dict[int, dict[int, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["question"]):
        if row["question"] % every == 0:
            found.setdefault(cell_key(row), {})[row["question"]] = {
                sample["sample"]: [pack_position(p, vocabulary) for p in sample["positions"]]
                for sample in row["shown"]
            }
    return found


def _lengths(rows: Sequence[Row]) -> list[int]:
    return [sample["tokens"] for row in rows for sample in row["samples"]]


def _edges(rows: Sequence[Row]) -> list[int]:
    """Bin edges in whole tokens, the same for all cells of a task; bin b is [edge b, edge b+1)."""
    lengths = _lengths(rows)
    width = max(1, math.ceil((max(lengths) - min(lengths) + 1) / _BINS))
    count = math.ceil((max(lengths) - min(lengths) + 1) / width)
    return [min(lengths) + width * i for i in range(count + 1)]


def _facts(settings: dict[str, Any]) -> list[tuple[str, str]]:
    soft = settings["soft"]
    return [
        ("Samples of a question", str(settings["samples"])),
        ("Most new tokens", str(settings["max_tokens"])),
        ("Temperature", ", ".join(f"{t:g}" for t in settings["temperatures"])),
        ("Top-k, top-p", f"{soft['top_k']}, {soft['top_p']:g}"),
        ("Mixture", f"tau {soft['tau']:g}, {soft['noise']} noise"),
        ("Thoughts", thoughts_label(settings)),
        ("Weights", settings["dtype"]),
        ("Seed", str(settings["seed"])),
    ]


def _sentences(results: dict[str, Any]) -> list[str]:
    """What the comparison of the modes says, for somebody who reads nothing else."""
    n, rows = results["settings"]["samples"], results["soft_minus_discrete"]
    if len(rows) > _MOST_SENTENCES:
        above = sum(row["mean"]["low"] > 0 for row in rows)
        below = sum(row["mean"]["high"] < 0 for row in rows)
        return [
            f"Of {len(rows)} comparisons at the same temperature, soft tokens have a higher "
            f"mean@{n} in {above}, a lower one in {below}; in the rest they are not told apart."
        ]
    said = []
    for row in rows:
        mean, place = row["mean"], f"On {task_label(row['task'])} at T {row['temperature']:g}"
        between = f"(95 % interval {mean['low']:+.3f} to {mean['high']:+.3f})"
        if mean["low"] <= 0 <= mean["high"]:
            said.append(
                f"{place} soft and discrete tokens are not told apart: mean@{n} differs by "
                f"{mean['value']:+.3f} {between}."
            )
        else:
            side = "above" if mean["value"] > 0 else "below"
            said.append(
                f"{place} soft tokens are {side} discrete ones by {abs(mean['value']):.3f} in "
                f"mean@{n} {between}."
            )
    return said


def _note(results: dict[str, Any]) -> str:
    lost = sum(cell["lost"] for cell in results["cells"])
    said = "Means over questions, with 95 % bootstrap intervals over questions. Answered: share of "
    said += "samples with an answer at all. Cut: share that reached the token limit."
    return said + (f" {lost} samples whose grader was killed count as wrong." if lost else "")


def _table_html(results: dict[str, Any]) -> str:
    n = results["settings"]["samples"]
    scores = (f"mean@{n}", f"pass@{n}", f"maj@{n}")
    names = ("task", "mode", "T", "questions", *scores, *_COLUMNS)
    speeds = {cell_key(row): row["tokens_per_second"] for row in results["speed"]}
    rows = [_cell_values(cell, speeds[cell_key(cell)]) for cell in results["cells"]]
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{value}</td>' for value in row)}</tr>" for row in rows)
    return f"<table class=scores><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell_values(cell: Row, speed: float | None) -> list[str]:
    return [
        escape(task_label(cell["task"])),
        escape(cell["mode"]),
        f"{cell['temperature']:g}",
        str(cell["questions"]),
        _interval_html(cell["mean"]),
        _interval_html(cell["pass"][-1]),
        _interval_html(cell["maj"]),
        _or_dash(cell["answered"], ".0%"),
        f"{cell['length']['mean']:.0f}",
        f"{cell['truncated']:.0%}",
        f"{cell['soft']:.0%}",
        _or_dash(cell["effective_candidates"], ".2f"),
        _or_dash(speed, ".0f"),
    ]


def _or_dash(value: float | None, form: str) -> str:
    return "&ndash;" if value is None else format(value, form)


def _interval_html(entry: Row | None) -> str:
    if entry is None:
        return "&ndash;"
    between = f"{entry['low']:.3f}&ndash;{entry['high']:.3f}"
    return f"{entry['value']:.3f}<span class=between>{between}</span>"
