"""The fields of a body, each read as what it has to be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from softgrpo.serve.errors import ApiError

# Beyond them float32 overflows on the way to a draw, which would end the samples of everybody.
_SMALLEST, _LARGEST = 1e-6, 1e6
_LARGEST_INTEGER = 2**32 - 1


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a body."""
    try:
        # UTF-8 alone: of bytes, json would take halves of surrogate pairs too.
        value = json.loads(body.decode(), parse_constant=_refuse)
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()  # fails for half of a surrogate pair
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(constant)


class Fields:
    """Typed access to a JSON object; null counts as absent. A wrong one is a 400 that names it."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = {name: value for name, value in values.items() if value is not None}

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def integer(self, name: str) -> int | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) > _LARGEST_INTEGER:
            raise wrong(name, value, "an integer below 2^32")
        return value

    def number(self, name: str) -> float | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong(name, value, "a number")
        if value != 0 and not _SMALLEST <= abs(value) <= _LARGEST:
            raise wrong(name, value, f"0, or between {_SMALLEST:g} and {_LARGEST:g} in size")
        return float(value)

    def boolean(self, name: str) -> bool:
        """False where it is absent; vLLM's extra arguments have no booleans, so 0 and 1 are too."""
        value = self.values.get(name, False)
        if value not in (False, True):
            raise wrong(name, value, "true or false")
        return bool(value)

    def string(self, name: str) -> str | None:
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            raise wrong(name, value, "a string")
        return value

    def strings(self, name: str, most: int, longest: int) -> tuple[str, ...]:
        """A string or a list of them: at most so many, of so many characters."""
        value = self.values.get(name, [])
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(i, str) and i for i in items):
            raise wrong(name, value, "a string or a list of non-empty strings")
        if len(items) > most or any(len(item) > longest for item in items):
            raise wrong(name, value, f"at most {most} strings of {longest} characters")
        return tuple(items)

    def integers(self, name: str) -> tuple[int, ...]:
        value = self.values.get(name, [])
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise wrong(name, value, "a list of integers")
        return tuple(value)


def wrong(name: str, value: object, allowed: str) -> ApiError:
    """A 400 for a field."""
    shown = json.dumps(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    return ApiError(400, f"{name}={shown} is not allowed: must be {allowed}", name)
