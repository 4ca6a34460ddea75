"""Datasets as lists of Example, prompts as token ids, and which prompts a step trains on."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError

from softgrpo.config import Config, DataConfig, FewShot
from softgrpo.schema import did_you_mean

Message = dict[str, str]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[^/]+)?")


class DataError(ValueError):
    """A dataset that cannot be used; one line with the place and the remedy."""


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


@dataclass(frozen=True)
class Prompt:
    """An example as the model sees it: token_ids end where the assistant's answer begins."""

    example: Example
    token_ids: list[int]


class TrainingData:
    """The training and held-out examples of a run.

    The constructor reads and checks both datasets; no model is needed for it. `prepare` then sets
    the tokenizer. By exact text, held-out questions are removed from training (`removed` counts
    them) and worked examples from both: their answers stand in the prompt. `too_long` counts what
    `data.drop_long_prompts` left out. Raises DataError, one line.
    """

    def __init__(self, config: Config) -> None:
        data = config.data
        self.config = config
        shown = {shot.prompt for shot in data.few_shot}
        held_out = load_examples(data.eval, data) if data.eval else []
        self.held_out = [e for e in held_out if e.text not in shown][: data.eval_size]
        if data.eval and not self.held_out:
            raise DataError(f"{data.eval}: every example is one of data.few_shot")
        examples = load_examples(data.train, data)
        known = shown | {example.text for example in self.held_out}
        self.train = [example for example in examples if example.text not in known]
        self.removed = len(examples) - len(self.train)
        if not self.train:
            raise DataError(f"{data.train}: every example is also held out in {data.eval}")
        self.too_long = 0
        self._tokenizer: Any = None

    def prepare(self, tokenizer: Any) -> list[Prompt]:
        """Sets the tokenizer and returns every prompt of the run, so that none fails later."""
        self._tokenizer = tokenizer
        config = self.config
        if config.data.drop_long_prompts:
            self._drop_long_prompts()
        rounds = range(config.run.max_steps * (1 + config.algorithm.dynamic_sampling_rounds))
        indices = sorted({index for number in rounds for index in self._indices(number)})
        name = self.config.data.train
        train = [self._encode(self.train[i], f"{name}, example {i}") for i in indices]
        return train + self.eval_prompts()

    def prompts_of_round(self, number: int) -> list[Prompt]:
        """The prompts of a round, 0-based: a pure function of (run.seed, number).

        A step takes one round, and further ones where dynamic sampling refills it.
        """
        name = self.config.data.train
        return [
            self._encode(self.train[index], f"{name}, example {index}")
            for index in self._indices(number)
        ]

    def eval_prompts(self) -> list[Prompt]:
        """The prompts of the held-out examples, at most `data.eval_size`."""
        return [
            self._encode(example, f"{self.config.data.eval}, example {index}")
            for index, example in enumerate(self.held_out)
        ]

    def _indices(self, number: int) -> list[int]:
        count = self.config.rollout.prompts_per_step
        seed = self.config.run.seed if self.config.data.shuffle else None
        return round_indices(len(self.train), number, count, seed)

    def _drop_long_prompts(self) -> None:
        data, before = self.config.data, len(self.train)
        shots = (self._tokenizer, data.system_prompt, data.few_shot)
        self.train = [
            example
            for example in self.train
            if len(build_prompt(example, *shots)) <= data.max_prompt_tokens
        ]
        self.too_long = before - len(self.train)
        if not self.train:
            raise DataError(
                f"{data.train}: every prompt is longer than data.max_prompt_tokens "
                f"({data.max_prompt_tokens})"
            )

    def _encode(self, example: Example, where: str) -> Prompt:
        data = self.config.data
        try:
            ids = build_prompt(example, self._tokenizer, data.system_prompt, data.few_shot)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        if len(ids) > data.max_prompt_tokens:
            raise DataError(
                f"{where}: the prompt has {len(ids)} tokens, data.max_prompt_tokens allows "
                f"{data.max_prompt_tokens}"
            )
        return Prompt(example, ids)


def round_indices(size: int, number: int, count: int, seed: int | None) -> list[int]:
    """Which examples the 0-based round takes, `count` of them; seed None keeps their order.

    Epoch e runs through the permutation drawn from (seed, e); a round may span several epochs.
    """
    positions = range(number * count, (number + 1) * count)
    orders: dict[int, np.ndarray] = {}
    for epoch in {position // size for position in positions}:
        orders[epoch] = (
            np.arange(size)
            if seed is None
            else np.random.default_rng([seed, epoch]).permutation(size)
        )
    return [int(orders[position // size][position % size]) for position in positions]


def build_prompt(
    example: Example,
    tokenizer: Any,
    system_prompt: str | None = None,
    few_shot: Sequence[FewShot] = (),
) -> list[int]:
    """Token ids by the model's chat template, up to where the assistant's turn begins.

    The template alone writes special tokens, BOS included, and a <think> that opens the answer.
    Raises DataError when the tokenizer has no template, when the template refuses the turns, or
    when the example brings a system message of its own beside `system_prompt`.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("the tokenizer has no chat template; give the model a chat_template.jinja")
    turns: list[Message] = (
        [{"role": "user", "content": example.prompt}]
        if isinstance(example.prompt, str)
        else list(example.prompt)
    )
    system = [turns.pop(0)] if turns[0]["role"] == "system" else []
    if system and system_prompt is not None:
        raise DataError("the prompt has a system message of its own; unset data.system_prompt")
    if system_prompt is not None:
        system = [{"role": "system", "content": system_prompt}]
    shots = [
        {"role": role, "content": content}
        for shot in few_shot
        for role, content in (("user", shot.prompt), ("assistant", shot.answer))
    ]
    try:
        ids = tokenizer.apply_chat_template(
            system + shots + turns, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in system + shots + turns)
        raise DataError(f"the model's chat template refuses {roles}: {_one_line(error)}") from None
    return list(ids)


def load_examples(spec: str, data: DataConfig) -> list[Example]:
    """Reads a dataset: `reasoning_gym:NAME?key=value&...`, a .jsonl/.json/.parquet file, or a hub
    id `organisation/name[:split]` (split `train` by default).

    Rows have the layout of TRL (`prompt`, text or chat messages, and any further columns) or of
    verl (`prompt`, messages, and `reward_model.ground_truth`). Raises DataError, one line, for
    everything that is wrong with it.
    """
    if spec.startswith("reasoning_gym:"):
        rows = _reasoning_gym_rows(spec)
        data = dataclasses.replace(data, prompt_key="question", answer_key="answer")
    else:
        rows = read_rows(spec)
    examples = [_example(row, data, f"{spec}, example {index}") for index, row in enumerate(rows)]
    if not examples:
        raise DataError(f"{spec}: the dataset is empty")
    return examples


def read_rows(spec: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a file or a hub dataset, as `load_examples` names them."""
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}
    reader = readers.get(Path(spec).suffix)
    if reader is not None:
        if not Path(spec).is_file():
            raise DataError(f"no such file: {spec}")
        return reader(Path(spec))
    if _HUB_ID.fullmatch(spec):
        name, _, split = spec.partition(":")
        return hub_rows(name, None, split or "train")
    raise DataError(
        f"{spec!r} is no dataset: give reasoning_gym:NAME, a .jsonl, .json or .parquet file, or a "
        "hub id organisation/name[:split]"
    )


def _jsonl_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    # As bytes: a line that is no UTF-8 is then a line like any other that is not JSON.
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: not a JSON object")
            yield row


def _json_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: not a JSON list of objects")
    yield from rows


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a parquet file ({_one_line(error)})") from None
    yield from rows


def hub_rows(name: str, config: str | None, split: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a dataset of the Hugging Face hub."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"{name}: hub datasets need: pip install 'softgrpo[datasets]'") from None
    try:
        rows = datasets.load_dataset(*filter(None, (name, config)), split=split)
    except Exception as error:  # datasets, huggingface_hub and requests each raise their own
        raise DataError(
            f"cannot load {name} from the hub ({_one_line(error)}); check the name and the "
            "connection, or give a local file"
        ) from None
    yield from rows


def reasoning_gym_dataset(spec: str) -> Any:
    """The dataset of `reasoning_gym:NAME?key=value&...`, with seed 0 unless the spec gives one."""
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError:
        raise DataError(f"{spec}: needs reasoning-gym: pip install 'softgrpo[demo]'") from None
    name, _, query = spec.removeprefix("reasoning_gym:").partition("?")
    if name not in DATASETS:
        raise DataError(f"{spec}: no task {name!r}{did_you_mean(name, sorted(DATASETS))}")
    parameters = _parse_query(query, spec)
    known = [field.name for field in fields(DATASETS[name][1])]
    for key in parameters:
        if key not in known:
            raise DataError(f"{spec}: {name} has no parameter {key!r}{did_you_mean(key, known)}")
    try:
        # Without a seed reasoning_gym draws one from the clock: a resumed run saw other questions.
        return create_dataset(name, **{"seed": 0, **parameters})
    except Exception as error:  # assertions and whatever a generator trips over
        raise DataError(f"{spec}: {_one_line(error)}") from None


def _reasoning_gym_rows(spec: str) -> Iterator[Mapping[str, Any]]:
    dataset = reasoning_gym_dataset(spec)
    try:
        items = [dataset[i] for i in range(len(dataset))]
    except Exception as error:
        raise DataError(f"{spec}: {_one_line(error)}") from None
    for item in items:
        yield {**item["metadata"], "question": item["question"], "answer": item["answer"]}


def _parse_query(query: str, spec: str) -> dict[str, Any]:
    import yaml

    parameters = {}
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if not equals:
            raise DataError(f"{spec}: {part!r} is not of the form key=value")
        try:
            parameters[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise DataError(f"{spec}: cannot read the value of {part!r}") from None
    return parameters


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
    return Example(_checked_prompt(prompt, where), answer or "", columns)


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


def _checked_prompt(prompt: Any, where: str) -> str | list[Message]:
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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
