"""Writes report.html: the page of `page/` with the data of a run embedded in it."""

from __future__ import annotations

import os
import re
from html import escape
from importlib.resources import files
from pathlib import Path

from softgrpo.report.embed import embed_json, pack_curves, pack_samples
from softgrpo.report.read import Run, config_differences, read_run
from softgrpo.report.words import facts, held_out, sentences, training_reward

_SCRIPTS = ("dom.js", "charts.js", "figures.js", "token_view.js", "viewer.js")


def build_report(run_dir: Path, compare: Path | None = None) -> Path:
    """Writes ``<run_dir>/report.html``, one file that needs nothing else, and returns its path.

    compare: the folder of a second run whose curves are drawn over those of the first, dashed.
    Works on a run that is still going on, and on what a killed one left. Raises ValueError when
    a folder holds no metrics.jsonl.
    """
    run = read_run(run_dir)
    other = read_run(compare, samples=False) if compare is not None else None
    report = Path(run_dir) / "report.html"
    temporary = report.with_name(f"report.html.{os.getpid()}.tmp")
    temporary.write_text(_page(run, other), encoding="utf-8", errors="replace")
    os.replace(temporary, report)
    return report


def _page(run: Run, other: Run | None) -> str:
    runs = [run] if other is None else [run, other]
    data = {
        "runs": [pack_curves(r) for r in runs],
        "samples": pack_samples(run.samples),
        "samplesEvery": run.samples_every,
    }
    parts = {
        "title": escape(run.name),
        "style": asset("style.css"),
        "facts": _facts_html(run),
        "words": _words_html(run, other),
        "tiles": _tiles_html(run, other),
        "differences": _differences_html(run, other) if other else "",
        "config": _config_html(run),
        "data": embed_json(data),
        "script": "\n".join(asset(name) for name in _SCRIPTS),
    }
    return fill_page("page.html", parts)


def _facts_html(run: Run) -> str:
    return "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>"
        for label, value in facts(run)
    )


def _words_html(run: Run, other: Run | None) -> str:
    said = sentences(run)
    if other is not None:
        said.append(f"Dashed lines show the run {other.name}.")
    if run.unreadable:
        one = run.unreadable == 1
        lines = "line of its files was" if one else "lines of its files were"
        said.append(f"{run.unreadable} unreadable {lines} left out.")
    return escape(" ".join(said))


def _tiles_html(run: Run, other: Run | None) -> str:
    """The numbers that matter, large; those of the second run below them."""
    theirs = {change.label: change for change in held_out(other)} if other else {}
    tiles = [(f"held-out {c.label}", str(c), theirs.get(c.label)) for c in held_out(run)]
    reward = training_reward(run)
    if reward:
        tiles.append((reward.label, str(reward), training_reward(other) if other else None))
    return "".join(
        f"<div class=tile><span class=big>{escape(value)}</span><span>{escape(label)}</span>"
        + (f"<span class=theirs>{escape(other.name)}: {change}</span>" if other and change else "")
        + "</div>"
        for label, value, change in tiles
    )


def _differences_html(run: Run, other: Run) -> str:
    """The settings in which two runs differ; what the runs are called is no difference."""
    names = ("run.name", "run.output_dir", "run.resume")
    differences = [d for d in config_differences(run, other) if d[0] not in names]
    heading = f"<h2>What {escape(run.name)} does otherwise than {escape(other.name)}</h2>"
    if not differences:
        return f"<section id=differences>{heading}<p>Their settings are the same.</p></section>"
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in differences
    )
    heads = "".join(f"<th scope=col>{escape(n)}</th>" for n in ("setting", run.name, other.name))
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    return f"<section id=differences>{heading}<div class=scroll>{table}</div></section>"


def _config_html(run: Run) -> str:
    summary = "".join(f"{key}: {value}\n" for key, value in run.summary.items())
    text = run.config_text or "This run folder has no config.yaml.\n"
    return f"<pre tabindex=0>{escape(text)}</pre>" + (
        f"<h3>Summary</h3><pre>{escape(summary)}</pre>" if summary else ""
    )


def fill_page(template: str, parts: dict[str, str]) -> str:
    """A page of `page/` with its `{{name}}` replaced by the parts, as they are."""
    # One pass, so that nothing inside a value is taken for a placeholder.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], asset(template))


def asset(name: str) -> str:
    """A file of `page/`."""
    return (files("softgrpo.report") / "page" / name).read_text(encoding="utf-8")
