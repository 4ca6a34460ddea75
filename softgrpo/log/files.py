"""Rows of JSON on the disk, written so that a kill loses at most the last one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


@contextmanager
def saving(what: str) -> Iterator[None]:
    """Turns a failed write, such as on a full disk, into an OSError with one clear line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise OSError(
            f"cannot write {what}: {reason}; what was saved before is kept: make room, then "
            "run.resume=auto continues"
        ) from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file, without a last line that a kill cut short."""
    rows = []
    # A kill may cut the last line inside a character.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if any(lines[number:]):
                raise ValueError(f"{path}, line {number}: not JSON") from None
    return rows


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with saving(str(path)):
        temporary.write_text(text)
        sync(temporary)
        os.replace(temporary, path)


def json_line(row: dict[str, Any]) -> str:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    return json.dumps(finite, ensure_ascii=False) + "\n"


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with saving(str(path)), path.open("a") as file:
        file.writelines(json_line(row) for row in rows)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def number(value: Any) -> float | None:
    """A finite number, or None for everything else (NaN, infinity, null, text, a bool)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def dotted(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one mapping: {"optim.lr": 1e-6, ...}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= dotted(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
