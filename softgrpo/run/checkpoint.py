"""Weights and optimizer state on disk, in the format of torch.distributed.checkpoint.

Every process writes its shards; what was written by any number of processes is read by any other.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

STATE_FILE = "state.json"
_MODEL, _OPTIMIZER = "model/", "optimizer/"


class DamagedCheckpoint(ValueError):
    """A checkpoint that cannot be read; one line with its path and the reason."""


def write_tensors(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes this process's part of the weights and of the optimizer's state, to the disk itself.

    Raises OSError when it cannot.
    """
    tensors = {_MODEL + name: p.detach() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{_OPTIMIZER}{name}/{key}"] = torch.as_tensor(value)
    try:
        with _quietly():
            writer = FileSystemWriter(path, sync_files=True)
            state_dict_saver.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise OSError(_reason(error)) from None


def load_checkpoint(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Loads weights and optimizer state in place and returns the rest of the checkpoint's state.

    Raises ValueError naming the checkpoint when it is not one, or not of this model, and
    DamagedCheckpoint when it cannot be read; the weights are then undefined.
    """
    path = Path(path)
    if not (path / STATE_FILE).exists():
        raise ValueError(f"{path} is no checkpoint: it has no {STATE_FILE}")
    with _damage_named(path), torch.no_grad():
        state: dict[str, Any] = json.loads((path / STATE_FILE).read_text())
        reader = FileSystemReader(path)
        found = reader.read_metadata().state_dict_metadata
    tensors, moments = _places(path, model, found)
    with _damage_named(path), _quietly(), torch.no_grad():
        state_dict_loader.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    optimizer.state.update(moments)
    return state


def load_newest(
    paths: Sequence[Path],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    say: Callable[[str], None],
) -> tuple[Path, list[Path], dict[str, Any]]:
    """``load_checkpoint`` of the first path that can be read, newest first.

    Returns (path, the damaged ones before it, its state); the damaged ones are said. Raises
    DamagedCheckpoint when none can be read.
    """
    damaged: list[Path] = []
    for path in paths:
        try:
            return path, damaged, load_checkpoint(path, model, optimizer)
        except DamagedCheckpoint as error:
            say(f"warning: {error}")
            damaged.append(path)
    raise DamagedCheckpoint(
        f"no checkpoint can be read, {damaged[-1]} neither: restore one, or begin again under "
        "another run.name"
    )


def set_aside(damaged: Sequence[Path]) -> None:
    """Renames checkpoints that cannot be read, so that they are not taken for complete ones."""
    for path in damaged:
        shutil.rmtree(path.with_name(f"damaged_{path.name}"), ignore_errors=True)
        path.rename(path.with_name(f"damaged_{path.name}"))


def _places(
    path: Path, model: nn.Module, found: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[Tensor, dict[str, Tensor]]]:
    """Where the tensors of a checkpoint go: by their names in it, and as optimizer state."""
    tensors: dict[str, Tensor] = {}
    moments: dict[Tensor, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        weight = found.get(_MODEL + name)
        if not isinstance(weight, TensorStorageMetadata) or weight.size != parameter.shape:
            raise ValueError(f"checkpoint {path} is of another model: {name!r} does not fit")
        tensors[_MODEL + name] = parameter.detach()
    parameters = dict(model.named_parameters())
    for key, entry in found.items():
        if key.startswith(_OPTIMIZER):
            name, _, kind = key.removeprefix(_OPTIMIZER).rpartition("/")
            parameter = parameters[name]
            place = torch.zeros(entry.size, dtype=entry.properties.dtype, device=parameter.device)
            if entry.size == parameter.shape:
                place = torch.zeros_like(parameter, dtype=entry.properties.dtype)
            tensors[key] = moments.setdefault(parameter, {})[kind] = place.detach()
    return tensors, moments


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the warning that one process is alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (CheckpointException, OSError, EOFError, ValueError, RuntimeError, UnpicklingError) as e:
        raise DamagedCheckpoint(f"checkpoint {path} is damaged ({_reason(e)})") from None


def _reason(error: BaseException) -> str:
    """One line, also of what several processes have to say."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split()) or type(error).__name__
