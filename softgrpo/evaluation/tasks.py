"""The tasks: which questions, asked how, graded how."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from softgrpo.config.schema import did_you_mean
from softgrpo.config.sections import DataConfig
from softgrpo.data.examples import Example, load_examples
from softgrpo.data.sources import DataError, hub_rows, read_rows

GraderName = Literal["math", "choice", "code", "reasoning_gym"]
Row = Mapping[str, Any]

LETTERS = "ABCD"
_FILES = (".jsonl", ".json", ".parquet")
BOXED = " Let's think step by step and output the final answer within \\boxed{}."
_FENCED = "Think step by step, then give the whole program in one ```python block."


@dataclass(frozen=True)
class Task:
    """One set of questions. name: as the user gave it, of a benchmark without its file."""

    name: str
    examples: list[Example]
    grader: GraderName

    @property
    def label(self) -> str:
        return task_label(self.name)

    def digest(self) -> str:
        """Changes with any question or answer."""
        content = json.dumps([[e.prompt, e.answer, e.columns] for e in self.examples], default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Benchmark:
    """A published set. columns: those that `example` reads; a local file must have them."""

    hub: str
    config: str | None
    split: str
    columns: tuple[str, ...]
    grader: GraderName
    example: Callable[[Row], Example]


def _math(question: str) -> Callable[[Row], Example]:
    return lambda row: Example(row[question] + BOXED, str(row["answer"]).strip(), {})


def _gsm8k(row: Row) -> Example:
    answer = row["answer"].rpartition("####")[2].strip().replace(",", "")
    return Example(row["question"] + BOXED, answer, {})


def _gpqa(row: Row) -> Example:
    right = str(row["Correct Answer"]).strip()
    wrong = [str(row[f"Incorrect Answer {i}"]).strip() for i in (1, 2, 3)]

    def place(choice: str) -> int:
        # An order that any machine finds again, whatever else is evaluated.
        return zlib.crc32(f"{row['Question']}\n{choice}".encode())

    choices = sorted([right, *wrong], key=place)
    lines = [f"{letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=True)]
    prompt = (
        "\n".join([str(row["Question"]).strip(), "", *lines])
        + "\n\nLet's think step by step and output the letter of the answer within \\boxed{}."
    )
    return Example(prompt, LETTERS[choices.index(right)], {})


def _humaneval(row: Row) -> Example:
    prompt = (
        f"Complete this Python function:\n\n```python\n{row['prompt'].rstrip()}\n```\n\n{_FENCED}"
    )
    tests = f"{row['test']}\ncheck({row['entry_point']})"
    columns = {"header": row["prompt"], "entry_point": row["entry_point"], "tests": tests}
    return Example(prompt, "", columns)


def _mbpp(row: Row) -> Example:
    tests = "\n".join(row["test_list"])
    prompt = (
        f"{row['prompt'].strip()}\n\nThe program must pass these tests:\n\n{tests}\n\n{_FENCED}"
    )
    # test_imports are of the tests; a solution brings its own.
    return Example(prompt, "", {"tests": "\n".join([*row["test_imports"], tests])})


# Ids and splits as lighteval and lm-eval use them; MBPP sanitized, as the paper (257 questions).
BENCHMARKS = {
    "aime24": Benchmark(
        "HuggingFaceH4/aime_2024", None, "train", ("problem", "answer"), "math", _math("problem")
    ),
    "aime25": Benchmark(
        "yentinglin/aime_2025", None, "train", ("problem", "answer"), "math", _math("problem")
    ),
    "amc23": Benchmark(
        "math-ai/amc23", None, "test", ("question", "answer"), "math", _math("question")
    ),
    "math500": Benchmark(
        "HuggingFaceH4/MATH-500", None, "test", ("problem", "answer"), "math", _math("problem")
    ),
    "gsm8k": Benchmark("openai/gsm8k", "main", "test", ("question", "answer"), "math", _gsm8k),
    "gpqa_diamond": Benchmark(
        "Idavidrein/gpqa",
        "gpqa_diamond",
        "train",
        ("Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))),
        "choice",
        _gpqa,
    ),
    "humaneval": Benchmark(
        "openai/openai_humaneval",
        None,
        "test",
        ("prompt", "test", "entry_point"),
        "code",
        _humaneval,
    ),
    "mbpp": Benchmark(
        "google-research-datasets/mbpp",
        "sanitized",
        "test",
        ("prompt", "test_list", "test_imports"),
        "code",
        _mbpp,
    ),
}


def task_label(name: str) -> str:
    """The short name that tables show."""
    if name.startswith("reasoning_gym:"):
        return name.removeprefix("reasoning_gym:").partition("?")[0]
    return Path(name).stem if Path(name).suffix in _FILES else name


def split_names(text: str) -> list[str]:
    """The task names of a comma-separated list; commas inside brackets belong to a name."""
    return [name.strip() for name in re.split(r",(?![^\[\]{}]*[\]}])", text) if name.strip()]


def load_task(spec: str, data: DataConfig | None = None, limit: int | None = None) -> Task:
    """Reads a task: a benchmark, `benchmark=FILE` with the columns of its hub dataset,
    `reasoning_gym:NAME?key=value&...`, or a .jsonl, .json, .parquet file or hub dataset with prompt
    and answer.

    data: how it is asked. Its prompt_template rewrites the questions of the last two from their
    columns; a question that is one of its worked examples is left out. limit: only the first so
    many questions. Raises DataError, one line.
    """
    data = data or DataConfig()
    name, equals, file = spec.partition("=")
    grader: GraderName
    examples: Iterable[Example]
    if name in BENCHMARKS:
        grader = BENCHMARKS[name].grader
        examples = _benchmark_rows(name, file if equals else None)
    elif spec.startswith("reasoning_gym:"):
        name, grader = spec, "reasoning_gym"
        template = data.prompt_template or "{question}" + BOXED
        examples = [
            Example(e.prompt, e.answer, {"spec": spec, "index": i})
            for i, e in enumerate(load_examples(spec, replace(data, prompt_template=template)))
        ]
    elif "/" in spec or Path(spec).suffix:
        name, grader = spec, "math"
        examples = [Example(e.prompt, e.answer, {}) for e in load_examples(spec, data)]
        empty = next((i for i, e in enumerate(examples) if not e.answer.strip()), None)
        if empty is not None:
            raise DataError(f"{spec}, example {empty}: the answer is empty")
    else:
        raise DataError(
            f"no task {spec!r}{did_you_mean(spec, list(BENCHMARKS))} (or reasoning_gym:NAME, or a "
            ".jsonl or .parquet file with prompt and answer)"
        )
    shown = {shot.prompt for shot in data.few_shot}
    asked = (example for example in examples if example.text not in shown)
    return Task(name, list(itertools.islice(asked, limit)), grader)


def _benchmark_rows(name: str, file: str | None) -> Iterator[Example]:
    benchmark = BENCHMARKS[name]
    where = file or benchmark.hub
    needed = ", ".join(benchmark.columns)
    rows: Iterator[Row]
    if file is None:
        rows = hub_rows(benchmark.hub, benchmark.config, benchmark.split)
    elif Path(file).suffix in _FILES:
        rows = read_rows(file)
    else:
        raise DataError(f"{name}={file}: give a .jsonl, .json or .parquet file")
    number = -1
    try:
        for number, row in enumerate(rows):
            missing = [column for column in benchmark.columns if column not in row]
            if missing:
                raise DataError(
                    f"{where}, example {number}: no column {missing[0]!r}; {name} needs {needed}; "
                    f"columns: {', '.join(row)}"
                )
            example = _checked(benchmark, row, f"{where}, example {number}")
            yield example
    except DataError as error:
        if file is not None or number >= 0:
            raise
        raise DataError(f"{error}; from a file: --task {name}=FILE, columns {needed}") from None
    if number < 0:
        raise DataError(f"{where}: the dataset is empty")


def _checked(benchmark: Benchmark, row: Row, where: str) -> Example:
    try:
        example = benchmark.example(row)
    except (TypeError, AttributeError, KeyError):
        raise DataError(f"{where}: a value of {', '.join(benchmark.columns)} is not text") from None
    if benchmark.grader != "code" and not example.answer:
        raise DataError(f"{where}: the answer is empty")
    return example


def task_names(specs: Sequence[str]) -> list[str]:
    """The names of the tasks, without local files, in order; raises DataError for one twice."""
    names = [s.partition("=")[0] if s.partition("=")[0] in BENCHMARKS else s for s in specs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise DataError(f"task {twice!r} is given twice")
    return names
