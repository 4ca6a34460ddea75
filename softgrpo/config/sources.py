"""Where the values of a configuration come from: a recipe or file, its base, the command line."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from softgrpo.config.schema import ConfigError, did_you_mean


def read_values(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The nested values of a packaged recipe or YAML file, every scalar still text.

    A file may begin with `base: RECIPE_OR_FILE`: it then holds only what differs. Mappings are
    merged key by key, lists and scalars replaced; a base has no base of its own. overrides
    (`section.key=value`) win over both. Raises ConfigError, one line.
    """
    values = _read_mapping(path)
    base = values.pop("base", None)
    if base is not None:
        inherited = _read_mapping(str(base))
        if "base" in inherited:
            raise ConfigError(f"{path}: base {base!r} has a base of its own; name {base!r}'s base")
        values = _merged(inherited, values)
    for override in overrides:
        _apply(values, override)
    return values


def recipe_names() -> list[str]:
    """The packaged recipes that `Config.load` knows by name."""
    folder = importlib.resources.files("softgrpo") / "recipes"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name[0] not in "._")


def _read_mapping(path: str | Path) -> dict[str, Any]:
    values = _parse_yaml(_read(path), str(path)) or {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections such as 'run:' and 'optim:'")
    return values


def _read(path: str | Path) -> str:
    name = str(path)
    if Path(name).suffix in (".yaml", ".yml") or Path(name).name != name:
        try:
            return Path(name).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read config file {name!r}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"cannot read config file {name!r}: it is no UTF-8 text") from None
    if name not in recipe_names():
        raise ConfigError(f"no packaged recipe {name!r}{did_you_mean(name, recipe_names())}")
    return (importlib.resources.files("softgrpo") / "recipes" / f"{name}.yaml").read_text("utf-8")


def _parse_yaml(text: str, where: str) -> Any:
    try:
        document = yaml.load(text, Loader=yaml.BaseLoader)  # every scalar stays text: see schema
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    return "" if document is None else document


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        inner = merged.get(key)
        both = isinstance(inner, dict) and isinstance(value, dict)
        merged[key] = _merged(inner, value) if both else value  # type: ignore[arg-type]
    return merged


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    *sections, name = key.split(".")
    for section in sections:
        inner = values.get(section)
        if not isinstance(inner, dict):
            inner = values[section] = {}
        values = inner
    values[name] = _parse_yaml(text, f"override {override!r}")
