"""The rules of `softgrpo_kernels.row_rules` for one row on a device."""

from __future__ import annotations

import triton
import triton.language as tl

from softgrpo_kernels.gpu.soft_token.row import (
    CLAMP_HIGH,
    CLAMP_LOW,
    DISCRETE,
    EPS,
    GREEDY,
    MIN_P,
    MODE,
    NOISE,
    NOISE_SCALE,
    REACH,
    SKIP,
    SOFT,
    STREAM,
    TAU,
    TEMPERATURE,
    TOP_P,
    UID,
    float_of,
    has_listed_size,
    int_of,
    position_of,
)
from softgrpo_kernels.limits import (
    LARGEST,
    LAST_STREAM_OF_DRAWS,
    LAST_WORD,
    MAX_CANDIDATES,
    SMALLEST,
)
from softgrpo_kernels.methods import DIRICHLET, GUMBEL, MEAN, MULTIPLEX, MULTIPLEX_WEIGHTED

_GUMBEL, _DIRICHLET = tl.constexpr(GUMBEL), tl.constexpr(DIRICHLET)
_MULTIPLEX, _MULTIPLEX_WEIGHTED = tl.constexpr(MULTIPLEX), tl.constexpr(MULTIPLEX_WEIGHTED)
_MEAN, _MAX_DRAWS = tl.constexpr(MEAN), tl.constexpr(MAX_CANDIDATES)
_SMALLEST, _LARGEST = tl.constexpr(SMALLEST), tl.constexpr(LARGEST)
_LAST_WORD = tl.constexpr(LAST_WORD)
_LAST_STREAM_OF_DRAWS = tl.constexpr(LAST_STREAM_OF_DRAWS)


@triton.jit
def _inside(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Whether a parameter is in LOW .. HIGH; a NaN is not."""
    return (x >= LOW) & (x <= HIGH)


@triton.jit
def _soft_parameters_are_sound(row):
    noise, stream = int_of(row, NOISE), int_of(row, STREAM)
    scale, reach = float_of(row, NOISE_SCALE), float_of(row, REACH)
    low, high = float_of(row, CLAMP_LOW), float_of(row, CLAMP_HIGH)
    good = has_listed_size(row)
    good = good & _inside(float_of(row, TAU), _SMALLEST, _LARGEST)
    good = good & (reach >= 0.0)
    good = good & _inside(float_of(row, EPS), 0.0, _LARGEST)
    good = good & _inside(scale, 0.0, _LARGEST)
    good = good & (low <= high) & (low <= _LARGEST) & (high >= -_LARGEST)
    good = good & _inside(noise, _GUMBEL, _MEAN)
    good = good & ((noise < _DIRICHLET) | (stream <= _LAST_STREAM_OF_DRAWS))
    good = good & ((noise != _DIRICHLET) | (scale > 0.0))
    draws = _inside(scale, 1.0, _MAX_DRAWS) & (scale == tl.floor(scale))
    good = good & ((noise < _MULTIPLEX) | (noise > _MULTIPLEX_WEIGHTED) | draws)
    return good & ((noise < _MULTIPLEX) | (reach == float("inf")))


@triton.jit
def row_is_sound(row):
    """Whether a row that is not skipped keeps to all of them."""
    mode = int_of(row, MODE)
    good = _inside(mode, GREEDY, SKIP)
    good = good & _inside(position_of(row), 0, _LAST_WORD)
    good = good & _inside(int_of(row, UID), 0, _LAST_WORD)
    good = good & _inside(int_of(row, STREAM), 0, _LAST_WORD)
    if (mode == DISCRETE) | (mode == SOFT):
        good = good & _inside(float_of(row, TEMPERATURE), _SMALLEST, _LARGEST)
        good = good & _inside(float_of(row, TOP_P), 0.0, _LARGEST)
        good = good & _inside(float_of(row, MIN_P), 0.0, 1.0)
    if mode == SOFT:
        good = good & _soft_parameters_are_sound(row)
    return good
