"""Numbers of the configuration and the ranges that they are checked against."""

from __future__ import annotations

from typing import Annotated

from softgrpo.config.schema import Range

Count = Annotated[int, Range(0)]
Size = Annotated[int, Range(1)]
Seed = Annotated[int, Range(0, 2**64 - 1)]
NonNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, open_low=True)]
Fraction = Annotated[float, Range(0, 1, open_low=True)]
