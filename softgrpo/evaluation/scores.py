"""From graded samples to the numbers of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from softgrpo.evaluation.metrics import (
    bootstrap_intervals,
    majority,
    mean_at_n,
    pass_at_k,
    prefix_pass_at_k,
)

Estimator = Literal["unbiased", "prefix"]
Row = dict[str, Any]


@dataclass(frozen=True)
class QuestionScore:
    """One question: mean@n, pass@k for k = 1..n, and maj@n; None if nothing ever voted."""

    mean: float
    passes: list[float]
    maj: float | None


def question_score(
    correct: Sequence[bool], answers: Sequence[str | None], estimator: Estimator, *, votes: bool
) -> QuestionScore:
    """correct, answers: one a sample. votes: whether answers of this task can be compared.

    The majority is right when its samples are: the grader knows 1/2 and 0.5 to be equal, a
    comparison of texts does not.
    """
    n, c = len(correct), sum(correct)
    ks = range(1, n + 1)
    if estimator == "unbiased":
        passes = [pass_at_k(n, c, k) for k in ks]
    else:
        passes = [prefix_pass_at_k(correct, k) for k in ks]
    winner = majority(answers)
    right = {answer for answer, is_right in zip(answers, correct, strict=True) if is_right}
    maj = float(winner is not None and winner in right) if votes else None
    return QuestionScore(mean_at_n(correct), passes, maj)


def interval_table(scores: Sequence[QuestionScore]) -> Row:
    """{"mean": {value, low, high}, "pass": [... for k = 1..n], "maj": {...} or None}.

    Means over questions with 95 % bootstrap intervals over questions.
    """
    votes = all(score.maj is not None for score in scores)
    values_QM = np.array([[s.mean, *s.passes, s.maj if votes else 0.0] for s in scores])
    return _named(values_QM, votes)


def difference_table(ours: Sequence[QuestionScore], theirs: Sequence[QuestionScore]) -> Row:
    """`interval_table` of ours - theirs on the same questions: the paired bootstrap."""
    k = min(len(ours[0].passes), len(theirs[0].passes))
    votes = all(s.maj is not None for s in (*ours, *theirs))
    rows = [
        [a.mean - b.mean]
        + [x - y for x, y in zip(a.passes[:k], b.passes[:k], strict=True)]
        + [a.maj - b.maj if votes and a.maj is not None and b.maj is not None else 0.0]
        for a, b in zip(ours, theirs, strict=True)
    ]
    return _named(np.array(rows), votes)


def _named(values_QM: np.ndarray, votes: bool) -> Row:
    low, high = bootstrap_intervals(values_QM)
    means = values_QM.mean(axis=0)
    entries = [
        {"value": float(m), "low": float(a), "high": float(b)}
        for m, a, b in zip(means, low, high, strict=True)
    ]
    return {"mean": entries[0], "pass": entries[1:-1], "maj": entries[-1] if votes else None}


def cell_key(row: Row) -> tuple[str, str, float]:
    """What a cell of the grid is: (task, mode, temperature)."""
    return row["task"], row["mode"], row["temperature"]


def score_cell(rows: Sequence[Row], estimator: Estimator, *, votes: bool) -> list[QuestionScore]:
    """The scores of a cell's questions, in their order."""
    return [
        question_score(
            [s["correct"] for s in row["samples"]],
            [s["answer"] for s in row["samples"]],
            estimator,
            votes=votes,
        )
        for row in rows
    ]


def cell_summary(rows: Sequence[Row], estimator: Estimator, *, votes: bool) -> Row:
    """Everything that stands in the table for the finished questions of one cell.

    rows: as in samples.jsonl. answered: share of samples that give an answer at all, right or
    wrong; None where the answer is a program. length: tokens of a response. truncated: share of
    samples. soft: share of tokens. effective_candidates: mean 1/sum w^2 over soft positions.
    lost: samples whose grader was killed; they count as wrong.
    """
    task, mode, temperature = cell_key(rows[0])
    samples = [sample for row in rows for sample in row["samples"]]
    answered = sum(sample["answer"] is not None for sample in samples) / len(samples)
    lengths = np.array([sample["tokens"] for sample in samples])
    soft = sum(sample["soft"] for sample in samples)
    effective = sum(s["soft"] * s["effective_candidates"] for s in samples if s["soft"])
    return {
        "task": task,
        "mode": mode,
        "temperature": temperature,
        "questions": len(rows),
        "samples": len(rows[0]["samples"]),
        **interval_table(score_cell(rows, estimator, votes=votes)),
        "answered": answered if votes else None,
        "length": {
            "mean": float(lengths.mean()),
            "median": float(np.median(lengths)),
            "longest": int(lengths.max()),
        },
        "truncated": sum(s["finish_reason"] == "length" for s in samples) / len(samples),
        "soft": soft / int(lengths.sum()),
        "effective_candidates": effective / soft if soft else None,
        "lost": sum(s["score"] is None for s in samples),
    }


def group_cells(rows: Sequence[Row]) -> dict[tuple[str, str, float], list[Row]]:
    """The rows by cell, in order of question."""
    cells: dict[tuple[str, str, float], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["question"]):
        cells.setdefault(cell_key(row), []).append(row)
    return cells


def compare_cells(
    ours: Sequence[Row], theirs: Sequence[Row], estimator: Estimator, *, votes: bool
) -> Row:
    """`difference_table` of two cells; raises ValueError unless they hold the same questions."""
    for name in ("question", "prompt"):
        if [row.get(name) for row in ours] != [row.get(name) for row in theirs]:
            raise ValueError(f"task {ours[0]['task']!r}: the two sides hold different questions")
    return difference_table(
        score_cell(ours, estimator, votes=votes), score_cell(theirs, estimator, votes=votes)
    )
