"""Rows of datasets: from files, from the hub, from reasoning_gym."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from softgrpo.config.schema import did_you_mean

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[^/]+)?")


class DataError(ValueError):
    """A dataset that cannot be used; one line with the place and the remedy."""


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
    except ImportError as error:
        # It is there, perhaps, and what is missing is a package that it needs.
        why = "" if (error.name or "").startswith("reasoning_gym") else f" ({error})"
        raise DataError(f"{spec}: needs reasoning-gym: pip install 'softgrpo[demo]'{why}") from None
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


def reasoning_gym_rows(spec: str) -> Iterator[Mapping[str, Any]]:
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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
