"""Rewards and scores of the experiment that look at the form, or at anything but the form."""

from __future__ import annotations

import re
from typing import Any

BOX = re.compile(r"\\boxed\{-?\d+\}")
NUMBER = re.compile(r"-?\d+")


def format_reward(
    prompts: list[Any], completions: list[str], completion_ids: list[list[int]], **columns: Any
) -> list[float]:
    """1 where a response ends with one box that holds an integer, whichever it is."""
    return [
        float(len(BOX.findall(text)) == 1 and text.rstrip().endswith("}")) for text in completions
    ]


def format_free(text: str, gold: str) -> bool:
    """Whether the last number of a response is the answer, boxed or not, ended or not."""
    numbers = NUMBER.findall(text)
    return bool(numbers) and int(numbers[-1]) == int(gold)
