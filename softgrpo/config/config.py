"""The configuration of a run: dataclasses <- YAML recipe <- dotted overrides, checked strictly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

import yaml

from softgrpo.config.checks import check
from softgrpo.config.schema import build
from softgrpo.config.sections import ModelConfig, RunConfig, Sections
from softgrpo.config.sources import read_values


@dataclass(frozen=True)
class ConfigFile:
    """What every kind of run has: `load` reads a configuration, `to_yaml` writes it."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Reads a packaged recipe (a bare name such as `demo`) or a YAML file.

        overrides: `section.key=value`, the value in YAML: `optim.lr=1e-6`, `eval.k=[1, 4]`.
        Raises ConfigError, one line, before anything is loaded.
        """
        config: Self = build(cls, read_values(path, overrides))
        return config

    def to_yaml(self) -> str:
        """The resolved configuration; `load` reads it back to an equal one."""
        text: str = yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)
        return text


@dataclass(frozen=True)
class Config(Sections, ConfigFile):
    """A whole run of reinforcement learning."""

    def __post_init__(self) -> None:
        check(self)
