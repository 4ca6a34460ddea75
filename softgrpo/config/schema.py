"""Strict conversion of parsed YAML into nested dataclasses.

Every scalar arrives as text and is converted by the type that its key has, so that `1e-5` is a
number, `no` a word and `007` a name wherever the key wants one.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

# Settings of SoftParams that a policy cannot be trained with.
_INFERENCE_ONLY = ("cold_stop_entropy", "cold_stop_steps", "switch_window", "max_switches")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and what is allowed."""


@dataclass(frozen=True)
class Range:
    """Allowed interval of a number; `open_low` excludes the lower bound itself."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False

    def holds(self, value: float) -> bool:
        return (value > self.low if self.open_low else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        low = f"{'>' if self.open_low else '>='} {self.low}"
        return low if self.high == math.inf else f"{low} and <= {self.high}"


def build(cls: type, values: Any, path: str = "", root: type | None = None) -> Any:
    """Makes the dataclass `cls` from the mapping found at the dotted `path`.

    Raises ConfigError naming the key, its value and what is allowed. `root`, the outermost class,
    is where a misplaced key is looked for.
    """
    root = root or cls
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys ({', '.join(_names(cls))}), got {values!r}")
    for name in values:
        if name not in _names(cls):
            raise ConfigError(_unknown(cls, str(name), path, root))
    hints = typing.get_type_hints(cls, include_extras=True)
    for name in _names(cls):
        if name not in values and _is_required(cls, name):
            raise ConfigError(f"{path}.{name} is missing")
    prefix = f"{path}." if path else ""
    return cls(
        **{name: _convert(v, hints[name], prefix + name, root) for name, v in values.items()}
    )


def _convert(value: Any, hint: Any, key: str, root: type) -> Any:
    """`value`, text, list or mapping as YAML has it, as the type that the key wants."""
    if is_dataclass(hint) and isinstance(hint, type):
        return build(hint, {} if value == "" else value, key, root)
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        number, allowed = _convert(value, args[0], key, root), args[1]
        if not allowed.holds(number):
            raise ConfigError(f"{key}: {value} is not allowed: must be {allowed}")
        return number
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{key}: {value!r} is not allowed: must be one of {', '.join(args)}")
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, args, key, root)
    if origin is list or origin is tuple:
        return _convert_sequence(value, origin, args, key, root)
    return _convert_scalar(value, hint, key)


def _convert_union(value: Any, members: tuple[Any, ...], key: str, root: type) -> Any:
    if types.NoneType in members and value in ("", "null", "~", "none", "None"):
        return None
    *others, last = [member for member in members if member is not types.NoneType]
    for member in others:
        try:
            return _convert(value, member, key, root)
        except ConfigError:
            continue
    return _convert(value, last, key, root)


def _convert_sequence(value: Any, origin: type, args: tuple[Any, ...], key: str, root: type) -> Any:
    if not isinstance(value, list):
        raise ConfigError(f"{key}: expected a list, got {value!r}")
    if origin is tuple and len(value) != len(args):
        raise ConfigError(f"{key}: expected a list of {len(args)} values, got {len(value)}")
    hints = args if origin is tuple else args * len(value)
    pairs = zip(value, hints, strict=True)
    return origin(_convert(item, hint, f"{key}[{i}]", root) for i, (item, hint) in enumerate(pairs))


def _convert_scalar(value: Any, kind: type, key: str) -> Any:
    names = {bool: "true or false", int: "an integer", float: "a finite number", str: "text"}
    if isinstance(value, str):
        if kind is str:
            return value
        if kind is bool and value.lower() in ("true", "false"):
            return value.lower() == "true"
        try:
            number = kind(value) if kind is not bool else math.nan
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    raise ConfigError(f"{key}: expected {names[kind]}, got {value!r}")


def _unknown(cls: type, name: str, path: str, root: type) -> str:
    prefix = f"{path}." if path else ""
    if name in _INFERENCE_ONLY:
        return (
            f"{prefix + name}: is for inference alone (SoftParams, softgrpo-eval): the choice that "
            "it makes is a function of the policy which no density sees; leave it out"
        )
    what = "key" if path else "section"
    elsewhere = [key for key in _leaves(root, "") if key.split(".")[-1] == name]
    near = elsewhere[:1] or difflib.get_close_matches(name, _names(cls), n=1)
    if near:
        found = near[0] if near == elsewhere[:1] else prefix + near[0]
        return f"unknown {what} {prefix + name!r}; did you mean {found!r}?"
    return f"unknown {what} {prefix + name!r}; the {what}s are: {', '.join(_names(cls))}"


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The tail of an error message: the nearest known name, or all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(known)}"


def _names(cls: type) -> list[str]:
    return [f.name for f in fields(cls)]


def _leaves(cls: type, path: str) -> list[str]:
    """All dotted keys below a section."""
    keys: list[str] = []
    for name, hint in typing.get_type_hints(cls).items():
        key = f"{path}.{name}" if path else name
        keys += _leaves(hint, key) if is_dataclass(hint) and isinstance(hint, type) else [key]
    return keys


def _is_required(cls: type, name: str) -> bool:
    (found,) = [f for f in fields(cls) if f.name == name]
    return found.default is MISSING and found.default_factory is MISSING
