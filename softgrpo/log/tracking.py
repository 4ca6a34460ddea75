"""Metrics for TensorBoard, Weights & Biases and trackio, each through its own library."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softgrpo.config.schema import ConfigError
from softgrpo.log.files import number

# Name in log.report_to: the module that does it, the package that brings the module.
_LIBRARIES = {
    "tensorboard": ("torch.utils.tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "trackio": ("trackio", "trackio"),
}


class Tracking:
    """Hands the rows of metrics.jsonl on to the services that `log.report_to` names.

    The constructor imports their libraries and raises ConfigError for one that is missing; `start`
    opens the run. wandb and trackio get the project "softgrpo" unless WANDB_PROJECT or
    TRACKIO_PROJECT says otherwise; TensorBoard reads ``<run folder>/tensorboard``.
    """

    def __init__(self, services: Sequence[str]) -> None:
        self._libraries = {name: _import(name) for name in services}
        self._runs: list[Any] = []

    def start(self, folder: Path, name: str, config: dict[str, Any], first_step: int) -> None:
        """Opens the run; what a killed run wrote of ``first_step`` and later is replaced."""
        for service, library in self._libraries.items():
            if service == "tensorboard":
                writer = library.SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
                self._runs.append(_TensorBoard(writer))
            else:
                project = os.environ.get(f"{service.upper()}_PROJECT", "softgrpo")
                # A resumed run is a new one of the same group: rows cannot be taken back there.
                library.init(project=project, name=name, group=name, config=config)
                self._runs.append(library)

    def log(self, row: dict[str, Any]) -> None:
        """One row: its finite numbers, at its step."""
        values = {name: value for name in row if (value := number(row[name])) is not None}
        step = int(values.pop("step"))
        for run in self._runs:
            run.log(values, step=step)

    def close(self) -> None:
        """Ends the run everywhere."""
        for run in self._runs:
            run.finish()
        self._runs = []


class _TensorBoard:
    """A SummaryWriter under the method names of wandb."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


def _import(service: str) -> Any:
    module, package = _LIBRARIES[service]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"log.report_to: {service} cannot be used ({error}): pip install {package}"
        ) from None
