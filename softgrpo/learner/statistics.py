"""The numbers of an update, reduced where they arise."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from softgrpo_engine.transfer import ToHost


@dataclass(frozen=True)
class Summary:
    """Count, sum and extremes of numbers, from which those of their union follow."""

    count: float
    total: float
    smallest: float
    largest: float

    @property
    def mean(self) -> float:
        return self.total / self.count

    def __add__(self, other: Summary) -> Summary:
        return Summary(
            self.count + other.count,
            self.total + other.total,
            # A NaN stays one: min() and max() of Python may lose it.
            math.nan if self.is_nan or other.is_nan else min(self.smallest, other.smallest),
            math.nan if self.is_nan or other.is_nan else max(self.largest, other.largest),
        )

    @property
    def is_nan(self) -> bool:
        return math.isnan(self.smallest) or math.isnan(self.largest)


class Statistics:
    """Summaries of per-token numbers by name, made on the device: nobody waits for them, and
    nothing per token outlives its pass or goes to another process."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, name: str, values: Tensor, counted: Tensor | None = None) -> None:
        """Adds those of the values, of any shape, that count (bool, the same shape)."""
        if not values.numel():
            return
        values = values.detach().double()
        if counted is None:
            counted = torch.ones_like(values, dtype=torch.bool)
        part = (
            counted.sum().double(),
            torch.where(counted, values, 0.0).sum(),
            torch.where(counted, values, math.inf).amin(),
            torch.where(counted, values, -math.inf).amax(),
        )
        self._parts.setdefault(name, []).append(torch.stack(part))

    def summaries(self) -> dict[str, Summary]:
        """Of everything added that counts; waits for the device once."""
        names = [name for name, parts in self._parts.items() for _ in parts]
        parts = [part for parts in self._parts.values() for part in parts]
        if not parts:
            return {}
        rows = ToHost(torch.stack(parts)).wait().tolist()
        return merged({name: Summary(*row)} for name, row in zip(names, rows, strict=True))


def merged(parts: Iterable[dict[str, Summary]]) -> dict[str, Summary]:
    """Summaries of the union, of the names that have any numbers."""
    whole: dict[str, Summary] = {}
    for part in parts:
        for name, summary in part.items():
            if summary.count:
                whole[name] = whole[name] + summary if name in whole else summary
    return whole
