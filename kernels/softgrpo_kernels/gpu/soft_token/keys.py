"""Device functions: integers in the order of numbers, and of candidates."""

from __future__ import annotations

import triton
import triton.language as tl

MAX_ID = tl.constexpr(2**31 - 1)
# Less than the key of any candidate.
NOTHING = tl.constexpr(-(2**63))
# The order of -inf: no number has a smaller one.
LOWEST = tl.constexpr(-2139095041)


@triton.jit
def order_of(value):
    """int32 in the order of fp32 numbers; both zeros get one."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def number_of(order):
    """The fp32 number of an order."""
    bits = order ^ ((order >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def key_of(value, token):
    """int64 keys in the order of candidates: value descending, id ascending is key descending."""
    return (order_of(value).to(tl.int64) << 32) | (2147483647 - token).to(tl.int64)


@triton.jit
def value_of(key):
    """The fp32 value of a key."""
    return number_of((key >> 32).to(tl.int32))


@triton.jit
def token_of(key):
    """The token id of a key."""
    return 2147483647 - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def sorted_candidates(value, token, live):
    """(values, tokens, which are live) in the order of candidates, those that are not live last."""
    key = tl.sort(tl.where(live, key_of(value, token), NOTHING), descending=True)
    return value_of(key), token_of(key), key != NOTHING
