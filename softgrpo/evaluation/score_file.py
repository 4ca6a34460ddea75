"""Scores of generations that were made elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from softgrpo.data.examples import Example
from softgrpo.data.sources import DataError, read_rows
from softgrpo.evaluation.graders import Grader
from softgrpo.evaluation.scores import Estimator, interval_table, question_score


def score_file(path: str | Path, estimator: Estimator = "unbiased") -> dict[str, Any]:
    """mean@n, pass@1..n and maj@n of a file of generations, graded by math-verify.

    path: .jsonl, .json or .parquet; a row has `answer` (the gold one) and `completions` (a list of
    texts), or, one sample a row, `prompt`, `answer` and `completion`. Returns
    {"questions", "samples", "mean", "pass", "maj", "lost"}; mean, maj and every entry of pass
    (k = 1..n) are {"value", "low", "high"}: a mean over questions and its 95 % bootstrap interval.
    Raises DataError for missing columns and for questions with different numbers of samples.
    """
    questions = _questions(Path(path))
    counts = sorted({len(texts) for _, texts in questions})
    if len(counts) != 1:
        raise DataError(
            f"{path}: questions have {counts[0]} to {counts[-1]} samples: give each the same number"
        )
    grader = Grader("math")
    try:
        grades = [grader.grade(example, texts) for example, texts in questions]
    finally:
        grader.close()
    scores = [
        question_score([g.correct for g in row], [g.answer for g in row], estimator, votes=True)
        for row in grades
    ]
    lost = sum(g.score is None for row in grades for g in row)
    return {"questions": len(scores), "samples": counts[0], **interval_table(scores), "lost": lost}


def _questions(path: Path) -> list[tuple[Example, list[str]]]:
    """Every question with its completions, in order of first appearance."""
    found: dict[Any, tuple[Example, list[str]]] = {}
    for number, row in enumerate(read_rows(str(path))):
        one = "completions" not in row
        missing = {"prompt", "answer", "completion"} if one else {"answer"}
        missing -= set(row)
        if missing:
            raise DataError(
                f"{path}, row {number}: no column {sorted(missing)[0]!r}; a row needs answer and "
                f"completions, or prompt, answer and completion; columns: {', '.join(row)}"
            )
        texts = [row["completion"]] if one else list(row["completions"])
        if not texts or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{path}, row {number}: completions must be texts, at least one")
        key = str(row["prompt"]) if one else number
        example = Example(str(row.get("prompt", "")), str(row["answer"]), {})
        found.setdefault(key, (example, []))[1].extend(texts)
    if not found:
        raise DataError(f"{path}: there is nothing in it")
    return list(found.values())
