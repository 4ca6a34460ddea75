"""Device functions that find the kept prefix of a row over the vocabulary.

The prefix is (order, free): every token above `order`, and of those that tie with it the first
`free`. A cut bisects the order: top-k its 32 bits; top-p the few that occur in the bin of the
histogram where the mass reaches its limit, one or two where the logits are bfloat16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from softgrpo_kernels.gpu.soft_token.keys import LOWEST, MAX_ID, order_of
from softgrpo_kernels.gpu.soft_token.statistics import BINS
from softgrpo_kernels.gpu.soft_token.vocabulary_row import (
    CHUNK,
    bin_of,
    load_source,
    mass_above,
    mass_at,
    tied_up_to,
)


@triton.jit
def cut_by_top_k(source, scale, top_k, total, JOINT: tl.constexpr):
    """The first top_k of all tokens, and what top-p is then a share of."""
    order = tl.full((), LOWEST, tl.int32)
    free = tl.zeros((), tl.int64)
    number, mass = mass_above(source, scale, order)
    if number > top_k:
        low = tl.full((), LOWEST, tl.int64)
        high = order_of(scale.top).to(tl.int64)
        while high - low > 1:
            middle = (low + high) >> 1
            number, mass = mass_above(source, scale, middle.to(tl.int32))
            low = tl.where(number < top_k, low, middle)
            high = tl.where(number < top_k, middle, high)
        order = high.to(tl.int32)
        number, mass = mass_above(source, scale, order)
        free = top_k - number
    if not JOINT:
        mass += free * mass_at(order, scale)
        total = mass.to(tl.float64) / scale.unit.to(tl.float64)
    return order, free, total


@triton.jit
def _bracket(source, scale, limit, low, high):
    """The orders (low, high] that occur in the first bin up to which the mass reaches the limit:
    the first token there has less before it, those of the next bin do not."""
    i = tl.arange(0, BINS)
    up_to = tl.cumsum(tl.load(source.histogram + i), axis=0)
    bin = tl.min(tl.where(up_to.to(tl.float64) >= limit, i, BINS), axis=0)
    if bin < BINS:
        lowest = high
        highest = low
        for start in range(0, source.size, CHUNK):
            a, _ = load_source(source, start, CHUNK)
            mine = (a > -float("inf")) & (bin_of(a, scale.top) == bin)
            order = order_of(a).to(tl.int64)
            lowest = tl.minimum(lowest, tl.min(tl.where(mine, order, high), axis=0))
            highest = tl.maximum(highest, tl.max(tl.where(mine, order, low), axis=0))
        low, high = lowest - 1, highest
    return low, high


@triton.jit
def cut_by_top_p(source, scale, top_p, total, order, free, has_histogram):
    """Of the prefix so far the tokens with less than top_p of the total before them."""
    limit = top_p.to(tl.float64) * total * scale.unit.to(tl.float64)
    # The lowest order whose first token has less than that before it.
    low = order.to(tl.int64) - 1
    high = order_of(scale.top).to(tl.int64)
    if has_histogram:
        low, high = _bracket(source, scale, limit, low, high)
    while high - low > 1:
        middle = (low + high) >> 1
        _, mass = mass_above(source, scale, middle.to(tl.int32))
        inside = mass.to(tl.float64) < limit
        low = tl.where(inside, low, middle)
        high = tl.where(inside, middle, high)
    lowest = high.to(tl.int32)
    _, mass = mass_above(source, scale, lowest)
    each = tl.maximum(mass_at(lowest, scale), 1).to(tl.float64)
    # Token i of the tied has i times their mass before it, too.
    fits = tl.ceil((limit - mass.to(tl.float64)) / each).to(tl.int64)
    # The first token of all is always kept.
    fits = tl.maximum(fits, 1)
    return lowest, tl.where((lowest > order) | (fits < free), fits, free)


@triton.jit
def cut_by_min_p(scale, min_p, order, free):
    """Of the prefix so far the tokens with at least min_p times the largest probability."""
    exact = scale.top.to(tl.float64) + tl.log(min_p.to(tl.float64))
    near = exact.to(tl.float32)
    least = order_of(near) + (near.to(tl.float64) < exact).to(tl.int32)
    return tl.maximum(order, least), tl.where(least > order, MAX_ID, free)


@triton.jit
def kept_of(source, scale, order, free):
    """(last id of the tied that is kept, -1 for none; mass of the prefix in fp64)."""
    _, mass = mass_above(source, scale, order)
    tied = tied_up_to(source, scale, order, MAX_ID - 1)
    low = tl.full((), -1, tl.int64)
    high = low + source.vocabulary
    if (free < tied) & (free > 0):
        while high - low > 1:
            middle = (low + high) >> 1
            enough = tied_up_to(source, scale, order, middle.to(tl.int32)) >= free
            low = tl.where(enough, low, middle)
            high = tl.where(enough, middle, high)
    mass += tl.minimum(free, tied) * mass_at(order, scale)
    last = tl.where(free > 0, high, -1).to(tl.int32)
    return last, mass.to(tl.float64) / scale.unit.to(tl.float64)


@triton.jit
def kept_prefix(source, scale, limits, total, JOINT: tl.constexpr):
    """(order, last id of those that tie with it, mass in fp64) of what is kept of a row."""
    order = tl.full((), LOWEST, tl.int32)
    free = tl.zeros((), tl.int64)
    if limits.top_k > 0:
        order, free, total = cut_by_top_k(source, scale, limits.top_k, total, JOINT)
    if limits.top_p < 1:
        order, free = cut_by_top_p(
            source, scale, limits.top_p, total, order, free, limits.top_k == 0
        )
    if limits.min_p > 0:
        order, free = cut_by_min_p(scale, limits.min_p, order, free)
    last, mass = kept_of(source, scale, order, free)
    return order, last, mass
