"""The parameters that `soft_token` takes for every row, as two tables."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from softgrpo_kernels.checks import check_device, check_integers, check_k_max, check_word
from softgrpo_kernels.methods import NOISES
from softgrpo_kernels.row_rules import (
    ARGUMENTS,
    DISCRETE,
    FLOAT_COLUMNS,
    INT_COLUMNS,
    SOFT,
    RowValues,
    check_numbers,
    rules_of,
    surely_sound,
)
from softgrpo_kernels.soft_weights import weight_reach

Number = float | Tensor
Clamp = tuple[float, float] | Tensor | None


def _column(name: str) -> property:
    """The column of that name [B], a view."""
    table, columns = ("floats", FLOAT_COLUMNS) if name in FLOAT_COLUMNS else ("ints", INT_COLUMNS)
    place = columns.index(name)
    return property(lambda self: getattr(self, table)[place])


@dataclass(frozen=True)
class RowParameters:
    """The parameters of every row, a table of floats and one of integers: a column for each.

    floats: float32 [9, B], FLOAT_COLUMNS; ints: int64 [7, B], INT_COLUMNS; k_max: slots.
    may_be_unlisted: False promises that no row is `unlisted`, which saves a launch on a GPU.
    """

    floats: Tensor
    ints: Tensor
    k_max: int
    may_be_unlisted: bool = True

    temperature = _column("temperature")
    top_p = _column("top_p")
    min_p = _column("min_p")
    tau = _column("tau")
    reach = _column("reach")
    noise_scale = _column("noise_scale")
    clamp_low = _column("clamp_low")
    clamp_high = _column("clamp_high")
    eps = _column("eps")
    top_k = _column("top_k")
    seed = _column("seed")
    position = _column("position")
    uid = _column("uid")
    stream = _column("stream")
    mode = _column("mode")
    noise = _column("noise")

    @property
    def listed(self) -> Tensor:
        """bool [B]: sampled rows whose candidates fit into the slots."""
        sampled = (self.mode == DISCRETE) | (self.mode == SOFT)
        return sampled & (self.top_k >= 1) & (self.top_k <= self.k_max)

    @property
    def unlisted(self) -> Tensor:
        """bool [B]: discrete rows whose set may be larger than the slots."""
        return (self.mode == DISCRETE) & ~self.listed

    @staticmethod
    def pack(
        rows: int,
        device: torch.device,
        k_max: int,
        *,
        temperature: Number,
        top_k: int | Tensor,
        top_p: Number,
        min_p: Number,
        gumbel_tau: Number,
        weight_floor: Number,
        noise_scale: Number,
        noise_clamp: Clamp,
        eps: Number,
        seed: int | Tensor,
        position: int | Tensor,
        uid: int | Tensor,
        stream: int | Tensor,
        mode: int | Tensor,
        noise: str | Tensor,
    ) -> RowParameters:
        """Broadcasts numbers and [B] tensors into two tables.

        Raises:
            ValueError: a value of a wrong type or shape; on any device, a number out of its range.
        """
        check_k_max(k_max)
        low, high = _clamp_bounds(noise_clamp, rows)
        if isinstance(noise, str) and noise not in NOISES:
            raise ValueError(f"noise must be one of {', '.join(NOISES)}, not {noise!r}")
        code = NOISES.index(noise) if isinstance(noise, str) else noise
        # In the place of the reach the floor, until both it and tau are known to be numbers.
        values = RowValues(
            temperature, top_p, min_p, gumbel_tau, weight_floor, noise_scale, low, high, eps,
            top_k, seed, position, uid, stream, mode, code,
        )  # fmt: skip
        for name, value in zip(RowValues._fields, values, strict=True):
            _check_value(ARGUMENTS.get(name, name), value, rows, integer=name in INT_COLUMNS)
        values = values._replace(reach=weight_reach(gumbel_tau, weight_floor))
        if device.type != "cpu":  # there the op reads the tables
            check_numbers(values, k_max)
        floats, ints = _tables(values, rows, device)
        discrete = isinstance(mode, Tensor) or mode == DISCRETE
        listed = not isinstance(top_k, Tensor) and 1 <= top_k <= k_max
        return RowParameters(floats, ints, k_max, may_be_unlisted=discrete and not listed)

    def check_shape(self, rows: int, device: torch.device) -> None:
        """Raises ValueError unless these are contiguous tables of so many rows on the device."""
        for name, table, dtype, columns in (
            ("floats", self.floats, torch.float32, FLOAT_COLUMNS),
            ("ints", self.ints, torch.int64, INT_COLUMNS),
        ):
            shape = (len(columns), rows)
            if table.dtype != dtype or table.shape != shape or not table.is_contiguous():
                raise ValueError(
                    f"rows.{name} must be contiguous {dtype} {list(shape)}, not {table.dtype} "
                    f"{list(table.shape)}"
                )
            check_device(f"rows.{name}", table, device)
        check_k_max(self.k_max)

    def check(self) -> None:
        """Raises ValueError for a parameter out of its range; reads the tables: CPU only."""
        if not self.ints.numel() or self._surely_sound() or bool(self.sound.all()):
            return
        for rule in rules_of(self._values(), self.k_max):
            if bool(rule.broken.any()):
                raise rule.error(self.k_max)

    @property
    def sound(self) -> Tensor:
        """bool [B]: rows that `check` would not refuse; waits for nothing."""
        broken = torch.zeros_like(self.mode, dtype=torch.bool)
        for rule in rules_of(self._values(), self.k_max):
            broken = broken | rule.broken
        return ~broken

    def _values(self) -> RowValues:
        return RowValues(*self.floats, *self.ints)

    def _bounds(self) -> tuple[RowValues, RowValues]:
        """The smallest and the largest number of every column."""
        if self.ints.shape[1] == 1:  # nothing to reduce, an eighth of a small step
            values = RowValues(*self.floats[:, 0].tolist(), *self.ints[:, 0].tolist())
            return values, values
        low_floats, high_floats = torch.aminmax(self.floats, dim=1)
        low_ints, high_ints = torch.aminmax(self.ints, dim=1)
        low = RowValues(*low_floats.tolist(), *low_ints.tolist())
        return low, RowValues(*high_floats.tolist(), *high_ints.tolist())

    def _surely_sound(self) -> bool:
        """True where one pass over the tables shows it, as it mostly does."""
        low, high = self._bounds()
        if not surely_sound(low, high):
            return False
        if low.top_k >= 1 and high.top_k <= self.k_max:
            return True
        # Usual where rows are discrete.
        unlisted = (self.top_k < 1) | (self.top_k > self.k_max)
        return not bool(((self.mode == SOFT) & unlisted).any())


def _check_value(name: str, value: object, rows: int, *, integer: bool) -> None:
    if isinstance(value, Tensor):
        # One number, or one for every row.
        if value.dim() > 1 or (value.dim() == 1 and value.shape[0] not in (1, rows)):
            raise ValueError(f"{name} must be a number or [{rows}], not {list(value.shape)}")
        if integer:
            check_integers(name, value)
        elif value.is_complex():
            raise ValueError(f"{name} must be real, not {value.dtype}")
    elif integer:
        check_word(name, value)
    elif not isinstance(value, float | int | Real):
        raise ValueError(f"{name} must be a number or a tensor, not {value!r}")


def _tables(values: RowValues, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[9, rows] and [7, rows] of numbers and tensors."""
    floats = torch.empty((len(FLOAT_COLUMNS), rows), dtype=torch.float32, device=device)
    ints = torch.empty((len(INT_COLUMNS), rows), dtype=torch.int64, device=device)
    if device.type == "cuda" and not torch.compiler.is_compiling():
        from softgrpo_kernels.gpu.row_parameters import fill_rows

        fill_rows(floats, ints, values)
    else:
        _fill(floats, values.floats)
        _fill(ints, values.ints)
    return floats, ints


def _fill(table: Tensor, values: tuple[Any, ...]) -> None:
    # All numbers in one copy; on a device that copy would wait, and no compiler traces it.
    together = table.is_cpu and not torch.compiler.is_compiling()
    if together:
        numbers = [0 if isinstance(value, Tensor) else value for value in values]
        table.copy_(torch.tensor(numbers, dtype=table.dtype)[:, None])
    for i, value in enumerate(values):
        if not together or isinstance(value, Tensor):
            table[i] = value


def _clamp_bounds(noise_clamp: Clamp, rows: int) -> tuple[Number, Number]:
    if noise_clamp is None:
        return -torch.inf, torch.inf
    if isinstance(noise_clamp, Tensor):
        if noise_clamp.dim() != 2 or noise_clamp.shape[1] != 2:
            raise ValueError(f"noise_clamp must be [{rows}, 2], not {list(noise_clamp.shape)}")
        return noise_clamp[:, 0], noise_clamp[:, 1]
    if len(noise_clamp) != 2:
        raise ValueError(f"noise_clamp must be (low, high), not {noise_clamp!r}")
    low, high = noise_clamp
    return low, high
