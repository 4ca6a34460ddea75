"""What the parameters of a row must be.

One list of rules serves numbers on the host and whole tables alike. Tables on the CPU are refused;
on a device nobody can look without waiting, so there a row that breaks a rule is marked as not
valid (`gpu.soft_token.row_rules` says the same to Triton, and a test holds the two together).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softgrpo_kernels.limits import LARGEST, LAST_STREAM_OF_DRAWS, LAST_WORD, SMALLEST
from softgrpo_kernels.methods import DIRICHLET, DRAWS, GUMBEL, NOISES

# Values of `mode`.
GREEDY, DISCRETE, SOFT, SKIP = range(4)


class RowValues(NamedTuple):
    """The parameters of a row, or tensors [B], in the order of the tables of `RowParameters`: up to
    eps the float columns, from top_k on the integer ones. C++ (csrc/soft_token.h) has the same
    list."""

    temperature: Any = 1.0
    top_p: Any = 1.0
    min_p: Any = 0.0
    tau: Any = 1.0
    reach: Any = torch.inf
    noise_scale: Any = 1.0
    clamp_low: Any = -torch.inf
    clamp_high: Any = torch.inf
    eps: Any = 0.0
    top_k: Any = 1
    seed: Any = 0
    position: Any = 0
    uid: Any = 0
    stream: Any = 0
    mode: Any = SKIP
    noise: Any = GUMBEL

    @property
    def floats(self) -> tuple[Any, ...]:
        return self[: len(FLOAT_COLUMNS)]

    @property
    def ints(self) -> tuple[Any, ...]:
        return self[len(FLOAT_COLUMNS) :]


FLOAT_COLUMNS = RowValues._fields[: RowValues._fields.index("top_k")]
INT_COLUMNS = RowValues._fields[len(FLOAT_COLUMNS) :]
# What callers call a column, where they do not call it by its name.
ARGUMENTS = {
    "tau": "gumbel_tau",
    "reach": "weight_floor",
    "clamp_low": "noise_clamp",
    "clamp_high": "noise_clamp",
}


class Rule(NamedTuple):
    """broken: bool, or bool [B]. The rest makes the message; {k_max} in it is filled in."""

    broken: Any
    name: str
    value: Any
    text: str
    advice: str = ""

    def error(self, k_max: int) -> ValueError:
        """Names the first value that breaks it."""
        value = self.value
        if isinstance(self.broken, Tensor):
            value = value[self.broken][0].item()
        text = self.text.format(k_max=k_max)
        return ValueError(f"{text}, not {self.name} = {value}{self.advice}")


def surely_sound(low: RowValues, high: RowValues) -> bool:
    """Whether rows with parameters between these bounds keep to all rules, whatever their mode.

    False says nothing; it is what most calls need not ask further. top_k is left out.
    """
    # A NaN is both bounds, and no comparison holds for it.
    fine = low.temperature >= SMALLEST and high.temperature <= LARGEST
    fine &= low.tau >= SMALLEST and high.tau <= LARGEST
    fine &= low.reach >= 0.0
    fine &= low.top_p >= 0.0 and high.top_p <= LARGEST
    fine &= low.min_p >= 0.0 and high.min_p <= 1.0
    fine &= low.noise_scale >= 0.0 and high.noise_scale <= LARGEST
    fine &= low.eps >= 0.0 and high.eps <= LARGEST
    fine &= high.clamp_low <= low.clamp_high and high.clamp_low <= LARGEST
    fine &= low.clamp_high >= -LARGEST
    fine &= min(low.position, low.uid, low.stream) >= 0
    fine &= max(high.position, high.uid, high.stream) <= LAST_WORD
    fine &= low.mode >= GREEDY and high.mode <= SKIP
    fine &= low.noise >= GUMBEL and high.noise < len(DRAWS)
    if fine and high.noise >= DIRICHLET:
        scale, methods = low.noise_scale, DRAWS[int(low.noise) : int(high.noise) + 1]
        fine = high.stream <= LAST_STREAM_OF_DRAWS and scale == high.noise_scale
        fine &= not any(method.refuses_scale(scale) for method in methods)
        fine &= low.reach == torch.inf or not any(method.draws_token for method in methods)
    return fine


def rules_of(v: RowValues, k_max: int) -> Iterator[Rule]:
    """All rules. What a row does not read is not looked at: a greedy row may have temperature 0."""
    soft = v.mode == SOFT
    sampled = soft | (v.mode == DISCRETE)
    yield Rule(
        _outside(v.mode, GREEDY, SKIP), "mode", v.mode,
        "mode must be 0 (greedy), 1 (discrete), 2 (soft) or 3 (skip)",
    )  # fmt: skip
    yield Rule(
        soft & _outside(v.top_k, 1, k_max), "top_k", v.top_k,
        "a soft row needs 1 <= top_k <= k_max = {k_max}",
        "; give top_k (5 in the paper), or mode=1 to sample without mixing",
    )  # fmt: skip
    yield Rule(
        sampled & _outside(v.temperature, SMALLEST, LARGEST), "temperature", v.temperature,
        "temperature must be > 0, not denormal and finite in sampled rows (mode 0 is greedy)",
    )  # fmt: skip
    yield Rule(
        soft & _outside(v.tau, SMALLEST, LARGEST), "gumbel_tau", v.tau,
        "gumbel_tau must be > 0, not denormal and finite in soft rows",
    )  # fmt: skip
    yield Rule(
        soft & _outside(v.reach, 0.0, torch.inf), "tau ln(1 / weight_floor)", v.reach,
        "weight_floor must be in 0 .. 1",
    )  # fmt: skip
    yield Rule(
        sampled & _outside(v.top_p, 0.0, LARGEST), "top_p", v.top_p,
        "top_p must be >= 0 and finite (>= 1 keeps everything)",
    )  # fmt: skip
    yield Rule(
        sampled & _outside(v.min_p, 0.0, 1.0), "min_p", v.min_p, "min_p must be in 0 .. 1"
    )  # fmt: skip
    yield Rule(
        soft & _outside(v.noise_scale, 0.0, LARGEST), "noise_scale", v.noise_scale,
        "noise_scale must be >= 0 and finite",
    )  # fmt: skip
    yield Rule(
        soft & _no_interval(v.clamp_low, v.clamp_high), "low", v.clamp_low,
        "noise_clamp must be (low, high) with low <= high, neither NaN nor both infinite alike",
    )  # fmt: skip
    yield Rule(
        soft & _outside(v.eps, 0.0, LARGEST), "eps", v.eps, "eps must be >= 0 and finite"
    )  # fmt: skip
    for name in ("position", "uid", "stream"):
        word = getattr(v, name)
        yield Rule(
            (v.mode != SKIP) & _outside(word, 0, LAST_WORD), name, word,
            f"{name} must be in 0 .. 2^32 - 1 (take it modulo 2^32)",
        )  # fmt: skip
    yield from _rules_of_noise(v, soft)


def _rules_of_noise(v: RowValues, soft: Any) -> Iterator[Rule]:
    yield Rule(
        soft & _outside(v.noise, 0, len(DRAWS) - 1), "noise", v.noise,
        f"noise must be 0 .. {len(DRAWS) - 1} ({', '.join(NOISES)})",
    )  # fmt: skip
    yield Rule(
        soft & (v.noise >= DIRICHLET) & (v.stream > LAST_STREAM_OF_DRAWS), "stream", v.stream,
        f"stream must be below 2^16 with {', '.join(NOISES[DIRICHLET:])} noise",
    )  # fmt: skip
    for method in DRAWS:
        yield Rule(
            soft & (v.noise == method.code) & method.refuses_scale(v.noise_scale),
            "noise_scale", v.noise_scale, method.scale_rule,
        )  # fmt: skip
        if method.draws_token:
            yield Rule(
                soft & (v.noise == method.code) & (v.reach < torch.inf),
                "tau ln(1 / weight_floor)", v.reach,
                f"weight_floor must be 0 with {method.noise} noise, whose token need not be the "
                "heaviest",
            )  # fmt: skip


def check_numbers(v: RowValues, k_max: int) -> None:
    """Raises ValueError for numbers that no row may have; tensors among them are passed over.

    Where the mode is a tensor, only the device knows which numbers are read: a NaN is refused.
    """
    numbers = RowValues(
        *(
            default if isinstance(value, Tensor) else value
            for default, value in zip(_NEUTRAL, v, strict=True)
        )
    )
    listed = numbers.mode != SOFT or 1 <= numbers.top_k <= k_max
    if listed and surely_sound(numbers, numbers):
        return
    for name, value in zip(RowValues._fields, numbers, strict=True):
        if value != value:
            raise ValueError(f"{ARGUMENTS.get(name, name)} must be a number, not NaN")
    for rule in rules_of(numbers, k_max):
        if rule.broken:
            raise rule.error(k_max)


_NEUTRAL = RowValues()


def _outside(x: Any, low: float, high: float) -> Any:
    # For numbers and tensors alike, and a NaN is outside.
    return ((x >= low) & (x <= high)) ^ True


def _no_interval(low: Any, high: Any) -> Any:
    return ((low <= high) & (low <= LARGEST) & (high >= -LARGEST)) ^ True
