"""The mathematical reward: is the content of the last \\boxed{} equal to the answer?"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Sequence
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

_BOX = "\\boxed{"
_OPERATORS = {"times": "*", "cdot": "*", "div": "/"}
_BOX_FIRST = LatexExtractionConfig(boxed_match_priority=0)
# It warns that its own time limit is off; that limit is an alarm, for the main thread only.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def math_reward(
    prompts: Sequence[Any],
    completions: Sequence[str | list[dict[str, str]]],
    answer: Sequence[str],
    **columns: Any,
) -> list[float | None]:
    """1.0 where the last \\boxed{} of a completion equals its answer by math-verify, else 0.0.

    Reward signature of TRL: completions are texts or, of chat prompts, lists of messages.
    No time limit of its own: a reward worker that hangs in sympy is killed by its runner.
    """
    return [
        float(is_correct(completion_text(completion), gold))
        for completion, gold in zip(completions, answer, strict=True)
    ]


def is_correct(text: str, gold: str) -> bool:
    """Whether the last box of `text` holds `gold`; without a closed box it does not.

    Where `gold` is an integer, arithmetic of numbers is no answer: \\boxed{16 + 70} is not 86.
    math-verify alone takes it, and a model that is trained on it learns to box the question.
    """
    content = last_boxed(text)
    if content is None or (_is_integer(gold) and _is_left_to_compute(content)):
        return False
    # Gold first: verify is not symmetric.
    return bool(verify(list(_parse_gold(gold)), _parse(content), timeout_seconds=None))


def extract_answer(text: str) -> str | None:
    """The content of the last box in a normal form for voting (7.50 is 7.5, \\frac12 is 1/2)."""
    content = last_boxed(text)
    return None if content is None else normalise_answer(content)


def normalise_answer(answer: str) -> str | None:
    """An answer, boxed or not, in the normal form of `extract_answer`; None if it is empty."""
    content = last_boxed(answer)
    parsed = _parse(answer if content is None else content)
    return str(parsed[0]) if parsed else None


def last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...}; None without one, and when it is not closed."""
    start = text.rfind(_BOX)
    if start < 0:
        return None
    depth = 0
    for index in range(start + len(_BOX) - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[start + len(_BOX) : index]
    return None


def completion_text(completion: str | list[dict[str, str]]) -> str:
    """The text of a completion, given as text or as a list of messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _is_integer(gold: str) -> bool:
    return getattr(_parse_gold(gold)[0], "is_Integer", False)


def _is_left_to_compute(content: str) -> bool:
    """Whether all after the last = is numbers, brackets and at least one operator between them."""
    # Brackets lose their sizes, and spaces of LaTeX are none.
    names = r"\\(times|cdot|div|left|right|[,;:! ])"
    value = re.sub(names, lambda name: _OPERATORS.get(name[1], ""), content)
    value = value.rpartition("=")[2]
    return bool(re.fullmatch(r"[\d\s.,()*/+-]*", value) and re.search(r"[\d)]\s*[*/+-]", value))


@functools.lru_cache(maxsize=4096)
def _parse_gold(gold: str) -> tuple[Any, ...]:
    content = last_boxed(gold)
    parsed = _parse(gold if content is None else content)
    if not parsed:
        raise ValueError(f"the answer {gold!r} cannot be read by math-verify")
    return tuple(parsed)


def _parse(content: str) -> list[Any]:
    """The expressions that math-verify sees in the content of a box, [] if there is nothing."""
    return list(parse(f"{_BOX}{content}}}", [_BOX_FIRST], parsing_timeout=None))
