"""Is a completion right, and what does it answer?"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from softgrpo.config.sections import RewardConfig, RewardFunction
from softgrpo.data.examples import Example
from softgrpo.data.sources import reasoning_gym_dataset
from softgrpo.evaluation.sandbox import passes
from softgrpo.evaluation.tasks import LETTERS, GraderName
from softgrpo.rewards.math import last_boxed
from softgrpo.rewards.runner import RewardRunner
from softgrpo.rewards.worker import RewardCall

_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_SAID_LETTER = re.compile(r"answer\s*(?:is|:)[\s*$(]*([A-D])\b", re.IGNORECASE)
_LONE_LETTER = re.compile(rf"\b([{LETTERS}])\b")


@dataclass(frozen=True)
class Grade:
    """score: 1 is right, None if the grader had to be killed. answer: what votes, if anything."""

    score: float | None
    answer: str | None

    @property
    def correct(self) -> bool:
        return self.score is not None and self.score >= 1.0


class Grader:
    """Grades the completions of one kind of task in processes that can be killed.

    math: the last \\boxed{} by math-verify. choice: the letter in the last \\boxed{}, else of
    "the answer is X". reasoning_gym: the content of the last \\boxed{} by the task's own scorer, of
    which only 1 is right. code: the last fenced block passes the tests
    (`softgrpo.evaluation.sandbox`).
    """

    def __init__(self, kind: GraderName, workers: int | None = None) -> None:
        """workers: processes that grade at once, by default one a core, at most 8."""
        workers = workers or min(8, os.cpu_count() or 1)
        self.kind = kind
        self._runner: RewardRunner | None = None
        if kind in ("math", "reasoning_gym"):
            own = "softgrpo.evaluation.graders.reasoning_gym_reward"
            path = "softgrpo.rewards.math_reward" if kind == "math" else own
            # A sympy expression that takes longer than this never ends.
            self._runner = RewardRunner(
                RewardConfig(functions=[RewardFunction(path)], timeout_s=10.0, workers=workers)
            )
        self._threads = ThreadPoolExecutor(workers)  # each waits for a program of its own

    def grade(self, example: Example, texts: Sequence[str]) -> list[Grade]:
        """The grades of completions of one question."""
        if self.kind == "choice":
            letters = [choice_letter(text) for text in texts]
            return [Grade(float(letter == example.answer), letter) for letter in letters]
        if self.kind == "code":
            programs = [code_program(text, example.columns) for text in texts]
            return [Grade(float(right), None) for right in self._threads.map(passes, programs)]
        return self._grade_boxes(example, [last_boxed(text) for text in texts])

    def close(self) -> None:
        self._threads.shutdown()
        if self._runner is not None:
            self._runner.close()

    def _grade_boxes(self, example: Example, boxes: Sequence[str | None]) -> list[Grade]:
        """Every distinct box once: most samples of a question agree with some other."""
        assert self._runner is not None
        distinct = list(dict.fromkeys(box for box in boxes if box is not None))
        columns = {**example.columns, "answer": example.answer}
        call = RewardCall(
            prompts=[example.prompt] * len(distinct),
            completions=[f"\\boxed{{{box}}}" for box in distinct],
            completion_ids=[[]]
            * len(distinct),  # a box is cut from its tokens; no grader reads them
            columns={name: [value] * len(distinct) for name, value in columns.items()},
        )
        (scores,) = self._runner.rewards(call).values()
        # The answers of reasoning_gym need not be mathematics: they vote as they are written.
        answers: Sequence[str | None] = [" ".join(box.split()) for box in distinct]
        if self.kind == "math":
            answers = self._runner.answers(call)
        grades = dict(zip(distinct, map(Grade, scores, answers), strict=True))
        return [Grade(0.0, None) if box is None else grades[box] for box in boxes]


def choice_letter(text: str) -> str | None:
    """The letter that a completion chooses, None without one."""
    box = last_boxed(text)
    if box is not None:
        letters = _LONE_LETTER.findall(box)
        return letters[0] if len(set(letters)) == 1 else None
    said = _SAID_LETTER.findall(text)
    return said[-1].upper() if said else None


def code_program(text: str, columns: dict[str, Any]) -> str:
    """The program of a completion with the tests after it."""
    blocks = _FENCE.findall(text)
    code = blocks[-1] if blocks else text
    header = columns.get("header", "")
    if header and f"def {columns['entry_point']}" not in code:
        code = header + code  # the body alone, as base models write it
    return f"{code}\n\n{columns['tests']}\n"


def reasoning_gym_reward(
    prompts: Sequence[Any],
    completions: Sequence[str],
    spec: Sequence[str],
    index: Sequence[int],
    **columns: Any,
) -> list[float | None]:
    """The score that the task itself gives to the content of the last \\boxed{}."""
    return [
        _own_score(one, i, last_boxed(text))
        for text, one, i in zip(completions, spec, index, strict=True)
    ]


def _own_score(spec: str, index: int, answer: str | None) -> float:
    dataset = _dataset(spec)
    try:
        return float(dataset.score_answer(answer, dataset[index]))
    except Exception:  # scorers trip over answers that have no form at all
        return 0.0


@functools.lru_cache(maxsize=64)
def _dataset(spec: str) -> Any:
    return reasoning_gym_dataset(spec)
