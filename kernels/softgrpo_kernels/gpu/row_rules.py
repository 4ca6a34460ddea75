"""The rules of `softgrpo_kernels.row_rules` for one row on a device."""

from __future__ import annotations

import triton
import triton.language as tl

from softgrpo_kernels.methods import DIRICHLET, GUMBEL, MULTIPLEX
from softgrpo_kernels.row_rules import (
    DISCRETE,
    GREEDY,
    LARGEST,
    LAST_STREAM_OF_DRAWS,
    LAST_WORD,
    MAX_CANDIDATES,
    SKIP,
    SMALLEST,
    SOFT,
)

_GREEDY, _DISCRETE = tl.constexpr(GREEDY), tl.constexpr(DISCRETE)
_SOFT, _SKIP = tl.constexpr(SOFT), tl.constexpr(SKIP)
_GUMBEL, _DIRICHLET = tl.constexpr(GUMBEL), tl.constexpr(DIRICHLET)
_MULTIPLEX, _MAX_DRAWS = tl.constexpr(MULTIPLEX), tl.constexpr(MAX_CANDIDATES)
_SMALLEST, _LARGEST = tl.constexpr(SMALLEST), tl.constexpr(LARGEST)
_LAST_WORD = tl.constexpr(LAST_WORD)
_LAST_STREAM_OF_DRAWS = tl.constexpr(LAST_STREAM_OF_DRAWS)


@triton.jit
def _load_inside(table, row, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Whether a parameter of the row is in LOW .. HIGH; a NaN is not."""
    x = tl.load(table + row)
    return (x >= LOW) & (x <= HIGH)


@triton.jit
def _soft_parameters_are_sound(floats, ints, batch, row, k_max):
    top_k, noise = tl.load(ints + row), tl.load(ints + 6 * batch + row)
    stream = tl.load(ints + 4 * batch + row)
    scale = tl.load(floats + 4 * batch + row)
    low, high = tl.load(floats + 5 * batch + row), tl.load(floats + 6 * batch + row)
    good = (top_k >= 1) & (top_k <= k_max)
    good = good & _load_inside(floats + 3 * batch, row, _SMALLEST, _LARGEST)
    good = good & _load_inside(floats + 7 * batch, row, 0.0, _LARGEST)
    good = good & (scale >= 0.0) & (scale <= _LARGEST)
    good = good & (low <= high) & (low <= _LARGEST) & (high >= -_LARGEST)
    good = good & (noise >= _GUMBEL) & (noise <= _MULTIPLEX)
    good = good & ((noise < _DIRICHLET) | (stream <= _LAST_STREAM_OF_DRAWS))
    good = good & ((noise != _DIRICHLET) | (scale > 0.0))
    draws = (scale >= 1.0) & (scale <= _MAX_DRAWS) & (scale == tl.floor(scale))
    return good & ((noise != _MULTIPLEX) | draws)


@triton.jit
def row_is_sound(floats, ints, batch, row, k_max):
    """Whether a row that is not skipped keeps to all of them."""
    mode = tl.load(ints + 5 * batch + row)
    good = (mode >= _GREEDY) & (mode <= _SKIP)
    for word in tl.static_range(2, 5):  # position, uid, stream
        good = good & _load_inside(ints + word * batch, row, 0, _LAST_WORD)
    if (mode == _DISCRETE) | (mode == _SOFT):
        good = good & _load_inside(floats, row, _SMALLEST, _LARGEST)
        good = good & _load_inside(floats + batch, row, 0.0, _LARGEST)
        good = good & _load_inside(floats + 2 * batch, row, 0.0, 1.0)
    if mode == _SOFT:
        good = good & _soft_parameters_are_sound(floats, ints, batch, row, k_max)
    return good
