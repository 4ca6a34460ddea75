"""Checks of arguments that several ops share: each raises a ValueError that names the argument."""

from __future__ import annotations

from typing import SupportsIndex

import torch
from torch import Tensor

from softgrpo_kernels.limits import LARGEST, LAST_WORD, MAX_CANDIDATES, SMALLEST


def check_integers(name: str, tensor: Tensor) -> None:
    """Raises ValueError for a tensor that does not hold integers."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must hold integers, not {tensor.dtype}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raises ValueError for a tensor on another device."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the other tensors on {device}: move it")


def check_counter_words(position: Tensor, uid: Tensor, stream: Tensor) -> None:
    """The counter of the noise has 32 bits for each of these.

    Raises:
        ValueError: one of them is outside 0 .. 2^32 - 1.
    """
    for name, value in (("position", position), ("uid", uid), ("stream", stream)):
        if value.numel() and (value.min() < 0 or value.max() > LAST_WORD):
            raise ValueError(f"{name} must be in 0 .. 2^32 - 1 (take it modulo 2^32)")


def check_k_max(k_max: int) -> None:
    """Raises ValueError for a number of slots that no back end has."""
    if not isinstance(k_max, int) or not 1 <= k_max <= MAX_CANDIDATES:
        raise ValueError(f"k_max must be 1 to {MAX_CANDIDATES}, not {k_max}")


def check_word(name: str, value: object) -> None:
    """Raises ValueError for a number that is no integer of 64 bits."""
    if not isinstance(value, int | SupportsIndex):  # NumPy's integers too
        raise ValueError(f"{name} must be an integer or a tensor of them, not {value!r}")
    if not -(2**63) <= int(value) < 2**63:
        raise ValueError(f"{name} must fit into a signed word of 64 bits, not {value}")


def check_divisor(name: str, value: float) -> None:
    """Raises ValueError for a number by which no fp32 number can be divided."""
    if not SMALLEST <= value <= LARGEST:
        raise ValueError(f"{name} must be > 0, not denormal and finite, not {value}")


def check_head_map(softcap: float | None, logit_scale: float) -> None:
    """Raises ValueError unless softcap tanh(logit_scale z / softcap) is a number."""
    if softcap is not None and not SMALLEST <= softcap <= LARGEST:
        raise ValueError(f"softcap must be > 0 or None, and finite, not {softcap}")
    if not -LARGEST <= logit_scale <= LARGEST:
        raise ValueError(f"logit_scale must be finite, not {logit_scale}")


def check_number_per_row(name: str, value: Tensor, rows: tuple[int, ...]) -> None:
    """Raises ValueError unless this is one number or one for every row."""
    if value.dim() > 0 and value.shape != rows:
        raise ValueError(f"{name} must be a number or {list(rows)}, not {list(value.shape)}")
