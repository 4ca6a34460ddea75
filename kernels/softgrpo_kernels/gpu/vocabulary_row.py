"""Device functions over one row of the vocabulary: whose it is, its order, its masses.

Masses are sums of unit * exp(a - max) in int64: exact, so that neither the order of the list nor
the number of threads decides a boundary. The unit of a row is the power of two with which its whole
mass is just below 2^62: no sum overflows, and rounding down loses less than V 2^-61 of the mass,
whatever the vocabulary. (C++ and the reference add in fp64, which cannot overflow. All three agree
on a boundary up to 1e-6, the error of an fp32 exponential.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from softgrpo_kernels.row_rules import DISCRETE

CHUNK = tl.constexpr(4096)
# The key of -inf: no number has a smaller one.
LOWEST = tl.constexpr(-2139095041)
MAX_ID = tl.constexpr(2**31 - 1)
_DISCRETE = tl.constexpr(DISCRETE)


@triton.jit
def is_mine(floats, ints, valid, batch, k_max, row):
    """Discrete, valid, and its set may be larger than the slots."""
    top_k = tl.load(ints + row)
    mode = tl.load(ints + 5 * batch + row)
    listed = (top_k >= 1) & (top_k <= k_max)
    return (mode == _DISCRETE) & ~listed & (tl.load(valid + row) != 0)


@triton.jit
def limits_of(floats, ints, batch, row, vocabulary):
    """temperature, top_k (0 for none), top_p, min_p, and whether any of them cuts."""
    temperature = tl.load(floats + row)
    top_p = tl.load(floats + batch + row)
    min_p = tl.load(floats + 2 * batch + row)
    top_k = tl.load(ints + row)
    top_k = tl.where((top_k > 0) & (top_k < vocabulary), top_k, 0)
    return temperature, top_k, top_p, min_p, (top_p < 1) | (min_p > 0) | (top_k > 0)


@triton.jit
def key_of(a):
    """int32 in the order of the numbers; both zeros get one key."""
    bits = tl.where(a == 0, 0.0, a).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def unit_of(total):
    """The unit, fp32, of a row whose sum of exp(a - max) is `total`, fp64, 1 or more."""
    exponent = (total.to(tl.int64, bitcast=True) >> 52) - 1023
    return ((61 - exponent + 127) << 23).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def mass_of(a, top, unit):
    return (tl.exp(a - top) * unit).to(tl.int64)


@triton.jit
def row_statistics(chunk, chunks, row, PADDED: tl.constexpr):
    """Maximum fp32 and sum exp(a - maximum) fp64 of the row."""
    i = tl.arange(0, PADDED)
    base = chunk + row.to(tl.int64) * chunks * 4
    m = tl.load(base + i * 4, mask=i < chunks, other=-float("inf"))
    s = tl.load(base + i * 4 + 1, mask=i < chunks, other=0.0)
    top = tl.max(m, 0)
    return top, tl.sum(s.to(tl.float64) * tl.exp(m - top).to(tl.float64), 0)


@triton.jit
def load_source(
    logits, vocabulary, listed_a, listed_id, from_list, size, temperature, start,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """a and token ids of one block of the list, or of the row itself; -inf past the end."""
    i = start + tl.arange(0, BLOCK)
    # (The interpreter cannot combine a block of truth values with a single one.)
    short = i < tl.where(from_list, size, 0)
    row = i < tl.where(from_list, 0, vocabulary)
    z = tl.load(logits + i, mask=row, other=-float("inf"))
    a = tl.load(listed_a + i, mask=short, other=-float("inf"))
    ids = tl.load(listed_id + i, mask=short, other=MAX_ID)
    a = tl.where(from_list, a, tl.div_rn(z.to(tl.float32), temperature))
    return a, tl.where(from_list, ids, i)


@triton.jit
def mass_above(
    logits, vocabulary, listed_a, listed_id, from_list, size, temperature, top, unit, key, maxima
):
    """Number and mass of the tokens of the source whose key is larger than this one."""
    number = tl.zeros((), tl.int64)
    mass = tl.zeros((), tl.int64)
    for start in range(0, size, CHUNK):
        highest = tl.load(maxima + start // CHUNK * 4, mask=from_list == 0, other=float("inf"))
        if key_of(highest) > key:
            a, _ = load_source(
                logits, vocabulary, listed_a, listed_id, from_list, size, temperature, start, CHUNK
            )
            above = key_of(a) > key
            number += tl.sum(above.to(tl.int32), 0)
            mass += tl.sum(tl.where(above, mass_of(a, top, unit), 0), 0)
    return number, mass


@triton.jit
def tied_up_to(
    logits, vocabulary, listed_a, listed_id, from_list, size, temperature, key, last, maxima
):
    """Number of tokens of the source with this key and an id up to `last`."""
    number = tl.zeros((), tl.int64)
    for start in range(0, size, CHUNK):
        highest = tl.load(maxima + start // CHUNK * 4, mask=from_list == 0, other=float("inf"))
        if key_of(highest) >= key:
            a, ids = load_source(
                logits, vocabulary, listed_a, listed_id, from_list, size, temperature, start, CHUNK
            )
            number += tl.sum(((key_of(a) == key) & (ids <= last)).to(tl.int32), 0)
    return number
