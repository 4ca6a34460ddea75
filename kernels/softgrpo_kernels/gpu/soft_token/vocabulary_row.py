"""Device functions over one row of the vocabulary: whose it is, its limits, its masses.

Masses are sums of unit * exp(a - max) in int64: exact, so that neither the order of the list nor
the number of threads decides a boundary. The unit of a row is the power of two with which its whole
mass is just below 2^62: no sum overflows, and rounding down loses less than V 2^-61 of the mass,
whatever the vocabulary. (C++ and the reference add in fp64, which cannot overflow. All three agree
on a boundary up to 1e-6, the error of an fp32 exponential.)
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from softgrpo_kernels.gpu.soft_token import statistics
from softgrpo_kernels.gpu.soft_token.keys import MAX_ID, number_of, order_of
from softgrpo_kernels.gpu.soft_token.row import (
    MIN_P,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    float_of,
    int_of,
)
from softgrpo_kernels.gpu.soft_token.statistics import (
    BINS,
    BINS_PER_NAT,
    COLUMNS,
    MASS,
    MAXIMUM,
    below_top,
    load_chunks,
)

CHUNK = tl.constexpr(statistics.CHUNK)


class Limits(NamedTuple):
    """What a row asks for. top_k: 0 for none. cuts: whether any of them leaves a token out."""

    temperature: tl.tensor
    top_k: tl.tensor
    top_p: tl.tensor
    min_p: tl.tensor
    cuts: tl.tensor


class Source(NamedTuple):
    """Where the tokens of a row are read: a list of `size` (a, id), or its `size` logits. length,
    histogram: the addresses of the length of the list, and of the masses by bin of what belongs in
    it, whether it fits or not."""

    logits: tl.tensor
    vocabulary: tl.tensor
    listed_a: tl.tensor
    listed_id: tl.tensor
    length: tl.tensor
    histogram: tl.tensor
    from_list: tl.tensor
    size: tl.tensor
    temperature: tl.tensor


class Scale(NamedTuple):
    """Of the masses of a row: its maximum, the unit, and the statistics of its chunks."""

    top: tl.tensor
    unit: tl.tensor
    chunk_sums: tl.tensor


@triton.jit
def limits_of(row, vocabulary):
    top_k, top_p, min_p = int_of(row, TOP_K), float_of(row, TOP_P), float_of(row, MIN_P)
    top_k = tl.where((top_k > 0) & (top_k < vocabulary), top_k, 0)
    cuts = (top_p < 1) | (min_p > 0) | (top_k > 0)
    return Limits(float_of(row, TEMPERATURE), top_k, top_p, min_p, cuts)


@triton.jit
def row_mass(chunk_sums, chunks, PADDED: tl.constexpr):
    """Maximum fp32 and sum exp(a - maximum) fp64 of the row."""
    maxima = load_chunks(chunk_sums, chunks, MAXIMUM, -float("inf"), PADDED)
    masses = load_chunks(chunk_sums, chunks, MASS, 0.0, PADDED)
    top, d = below_top(maxima)
    return top, tl.sum(masses.to(tl.float64) * tl.exp(d).to(tl.float64), 0)


@triton.jit
def unit_of(total):
    """The unit, fp32, of a row whose sum of exp(a - max) is `total`, fp64, 1 or more."""
    exponent = (total.to(tl.int64, bitcast=True) >> 52) - 1023
    return ((61 - exponent + 127) << 23).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def mass_of(a, top, unit):
    return (tl.exp(a - top) * unit).to(tl.int64)


@triton.jit
def bin_of(a, top):
    """The bin of the histogram that a token belongs to; larger a never have a larger bin."""
    return tl.minimum((top - a) * BINS_PER_NAT, BINS - 1).to(tl.int32)


@triton.jit
def mass_at(order, scale):
    """The mass of a token whose a has this order."""
    return mass_of(number_of(order), scale.top, scale.unit)


@triton.jit
def load_source(source, start, SIZE: tl.constexpr):
    """a and token ids of one block of the source; -inf past the end."""
    i = start + tl.arange(0, SIZE)
    # (The interpreter cannot combine a block of truth values with a single one.)
    short = i < tl.where(source.from_list, source.size, 0)
    row = i < tl.where(source.from_list, 0, source.vocabulary)
    z = tl.load(source.logits + i, mask=row, other=-float("inf"))
    a = tl.load(source.listed_a + i, mask=short, other=-float("inf"))
    ids = tl.load(source.listed_id + i, mask=short, other=MAX_ID)
    a = tl.where(source.from_list, a, tl.div_rn(z.to(tl.float32), source.temperature))
    return a, tl.where(source.from_list, ids, i)


@triton.jit
def highest_of(source, scale, start):
    """The order of the largest a of the chunk that begins here, where it is known."""
    place = scale.chunk_sums + start // CHUNK * COLUMNS
    return order_of(tl.load(place, mask=source.from_list == 0, other=float("inf")))


@triton.jit
def mass_above(source, scale, order):
    """Number and mass of the tokens of the source whose order is larger than this one."""
    number = tl.zeros((), tl.int64)
    mass = tl.zeros((), tl.int64)
    for start in range(0, source.size, CHUNK):
        if highest_of(source, scale, start) > order:
            a, _ = load_source(source, start, CHUNK)
            above = order_of(a) > order
            number += tl.sum(above.to(tl.int32), 0)
            mass += tl.sum(tl.where(above, mass_of(a, scale.top, scale.unit), 0), 0)
    return number, mass


@triton.jit
def tied_up_to(source, scale, order, last):
    """Number of tokens of the source with this order and an id up to `last`."""
    number = tl.zeros((), tl.int64)
    for start in range(0, source.size, CHUNK):
        if highest_of(source, scale, start) >= order:
            a, ids = load_source(source, start, CHUNK)
            number += tl.sum(((order_of(a) == order) & (ids <= last)).to(tl.int32), 0)
    return number
