"""The configuration of a run: dataclasses <- YAML recipe <- dotted overrides, checked strictly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from softgrpo.config.checks import check
from softgrpo.config.schema import build
from softgrpo.config.sections import Sections
from softgrpo.config.sources import read_values


@dataclass(frozen=True)
class Config(Sections):
    """A whole run: `Config.load` reads one, `to_yaml` writes it."""

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Config:
        """Reads a packaged recipe (a bare name such as `demo`) or a YAML file.

        overrides: `section.key=value`, the value in YAML: `optim.lr=1e-6`, `eval.k=[1, 4]`.
        Raises ConfigError, one line, before anything is loaded.
        """
        config: Config = build(cls, read_values(path, overrides))
        return config

    def to_yaml(self) -> str:
        """The resolved configuration; `Config.load` reads it back to an equal one."""
        text: str = yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)
        return text

    def __post_init__(self) -> None:
        check(self)
