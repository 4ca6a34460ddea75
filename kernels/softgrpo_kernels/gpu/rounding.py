"""Conversion of fp32 to a narrower dtype, to the nearest even in the interpreter too."""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x, fp32, as `dtype`. (Triton's interpreter cuts bf16 off instead of rounding it.)"""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)
