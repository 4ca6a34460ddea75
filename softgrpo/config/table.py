"""Every key of the configuration as Markdown tables, from the dataclasses.

python -m softgrpo.config.table docs/training.md    # writes the tables into the document
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import types
import typing
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from softgrpo.config import Config, SupervisedConfig

_MARK = "<!-- {}: python -m softgrpo.config.table -->"
_STARTS = {_MARK.format("keys"): Config, _MARK.format("keys of softgrpo-sft"): SupervisedConfig}
_END = "<!-- end of keys -->"


def config_table(config: type) -> str:
    """One table a section: key, default, what is allowed, meaning."""
    return "\n\n".join(_section(name, hint) for name, hint in _hints(config).items())


def with_config_table(document: str) -> str:
    """The document with the tables after their marks. Raises ValueError without marks."""
    for start, config in _STARTS.items():
        before, found, rest = document.partition(start)
        _, end, after = rest.partition(_END)
        if not (found and end):
            raise ValueError(f"the document has no {start} ... {_END}")
        document = f"{before}{start}\n\n{config_table(config)}\n\n{_END}{after}"
    return document


def _section(path: str, cls: type) -> str:
    summary = (inspect.getdoc(cls) or "").partition("\n")[0]
    rows, nested = [], []
    meanings = _meanings(cls)
    for field in fields(cls):
        hint = _hints(cls)[field.name]
        if is_dataclass(hint) and isinstance(hint, type):
            nested.append(_section(f"{path}.{field.name}", hint))
            continue
        cells = (f"`{field.name}`", _default(field), _allowed(hint), meanings[field.name])
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    head = f"**`{path}`** {summary}\n\n| key | default | allowed | |\n|---|---|---|---|\n"
    return "\n\n".join([head + "\n".join(rows), *nested])


def _meanings(cls: type) -> dict[str, str]:
    """`key: meaning` of the docstring, those of its bases first; a line that is indented further
    goes on with it."""
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        joined = re.sub(r"\n +", " ", inspect.getdoc(base) or "")
        meanings |= dict(re.findall(r"^(\w+): (.+)$", joined, re.MULTILINE))
    return meanings


def _default(field: Field[Any]) -> str:
    if field.default is not MISSING:
        value = field.default
    elif field.default_factory is not MISSING:
        value = field.default_factory()
    if isinstance(value, list | tuple):
        return "`[" + ", ".join(str(getattr(item, "path", item)) for item in value) + "]`"
    return f"`{value}`" if isinstance(value, str) and value else f"`{json.dumps(value)}`"


def _allowed(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{_allowed(args[0])} {args[1]}"
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (typing.Union, types.UnionType):
        parts = [_allowed(a) for a in args if a is not types.NoneType]
        return " or ".join([*parts, *(["null"] if types.NoneType in args else [])])
    if origin is list:
        return f"list of {_allowed(args[0])}" if not is_dataclass(args[0]) else "list"
    if origin is tuple:
        return f"list of {len(args)} numbers"
    return {bool: "true, false", int: "integer", float: "number", str: "text"}[hint]


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_config_table(path.read_text()))
