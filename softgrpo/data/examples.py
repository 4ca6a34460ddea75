"""Rows as examples: what is asked, and what rewards get beside it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softgrpo.config.sections import DataConfig
from softgrpo.data.sources import DataError, read_rows, reasoning_gym_rows

Message = dict[str, str]


@dataclass(frozen=True)
class Example:
    """One question.

    prompt: text, or chat messages that end with a user turn. answer: "" where the data has none.
    columns: what reward functions get beside `prompts` and `completions`; `answer` among them where
    there is one.
    """

    prompt: str | list[Message]
    answer: str
    columns: dict[str, Any]

    @property
    def text(self) -> str:
        """What is asked: the text of the last turn."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]


def load_examples(spec: str, data: DataConfig) -> list[Example]:
    """Reads a dataset: `reasoning_gym:NAME?key=value&...`, a .jsonl/.json/.parquet file, or a hub
    id `organisation/name[:split]` (split `train` by default).

    Rows have the layout of TRL (`prompt`, text or chat messages, and any further columns) or of
    verl (`prompt`, messages, and `reward_model.ground_truth`). Raises DataError, one line, for
    everything that is wrong with it.
    """
    if spec.startswith("reasoning_gym:"):
        rows = reasoning_gym_rows(spec)
        data = dataclasses.replace(data, prompt_key="question", answer_key="answer")
    else:
        rows = read_rows(spec)
    examples = [_example(row, data, f"{spec}, example {index}") for index, row in enumerate(rows)]
    if not examples:
        raise DataError(f"{spec}: the dataset is empty")
    return examples


def _example(row: Mapping[str, Any], data: DataConfig, where: str) -> Example:
    if data.prompt_template is not None:
        shown = {key: value for key, value in row.items() if key != data.answer_key}
        prompt: Any = _fill(data.prompt_template, shown, where)
    elif data.prompt_key in row:
        prompt = row[data.prompt_key]
    else:
        raise _no_column(data.prompt_key, row, where, "data.prompt_key")
    templated = data.prompt_template is not None
    columns = {k: v for k, v in row.items() if templated or k != data.prompt_key}
    answer = _answer(row, data.answer_key, where)
    if answer is not None:
        columns["answer"] = answer
    return Example(checked_prompt(prompt, where), answer or "", columns)


def _answer(row: Mapping[str, Any], key: str | None, where: str) -> str | None:
    reward_model = row.get("reward_model")
    if key is None:
        return None
    if key in row:
        answer = row[key]
    elif isinstance(reward_model, Mapping) and "ground_truth" in reward_model:  # verl's layout
        answer = reward_model["ground_truth"]
    else:
        missing = _no_column(key, row, where, "data.answer_key")
        raise DataError(f"{missing}; data.answer_key=null where no reward needs one")
    if not isinstance(answer, str | int | float):
        raise DataError(f"{where}: the answer must be text or a number, got {answer!r}")
    return str(answer)


def _fill(template: str, row: Mapping[str, Any], where: str) -> str:
    """Replaces `{column}`; other braces, such as those of \\boxed{}, stay."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in row:
            raise _no_column(match[1], row, where, "data.prompt_template")
        return str(row[match[1]])

    return re.sub(r"\{([A-Za-z_]\w*)\}", value, template)


def checked_prompt(prompt: Any, where: str) -> str | list[Message]:
    """The prompt of a row. Raises DataError for what is neither text nor chat messages."""
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and prompt:
        if all(isinstance(m, Mapping) and isinstance(m.get("content"), str) for m in prompt):
            messages = [{"role": str(m.get("role")), "content": m["content"]} for m in prompt]
            if messages[-1]["role"] == "user":
                return messages
        raise DataError(
            f"{where}: a prompt of messages needs role and content in each, the last of role user"
        )
    raise DataError(f"{where}: the prompt must be text or chat messages, got {prompt!r}")


def _no_column(key: str, row: Mapping[str, Any], where: str, setting: str) -> DataError:
    return DataError(f"{where}: no column {key!r} ({setting}); columns: {', '.join(row)}")
