"""Copies between host and device; on a GPU the host goes on, and waits only where it reads."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


def to_device(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """The values on the device, for work that is launched after this."""
    host = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if device.type != "cuda" or host.device == device:
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def on_device(value: T, device: torch.device) -> T:
    """A dataclass with all of its tensors on the device, those of dataclasses in it too."""
    moved: dict[str, Any] = {}
    for field in dataclasses.fields(value):  # type: ignore[arg-type]
        part = getattr(value, field.name)
        if isinstance(part, Tensor):
            moved[field.name] = to_device(part, device)
        elif dataclasses.is_dataclass(part):
            moved[field.name] = on_device(part, device)
    return dataclasses.replace(value, **moved)  # type: ignore[type-var]


def check_device(device: torch.device) -> None:
    """Raises RuntimeError where the device computes nothing any more: some errors of CUDA stay
    until the process ends. Waits for it."""
    if (torch.ones((), device=device) + 1.0).item() != 2.0:
        raise RuntimeError(f"{device} computes 1 + 1 wrongly")


class ToHost:
    """A tensor on its way to the host, behind the work that was launched before it."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._arrived = tensor, None
        if tensor.is_cuda:
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> Tensor:
        """The tensor on the host; waits for nothing that was launched after it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensor
