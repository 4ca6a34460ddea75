"""Kernels with the faults that aot.py looks for; they are compiled and never run."""

import triton
import triton.language as tl


@triton.jit
def scaled_by_sum(out, x, size, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i).to(tl.float32)
    tl.store(out + i, v * tl.sum(v, 0))


@triton.jit
def multiply_add(out, x, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < size, other=0.0).to(tl.float32)
    tl.store(out + i, v * 2.5 + 1.0, mask=i < size)


@triton.jit
def explicit_fma(out, x, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < size, other=0.0).to(tl.float32)
    tl.store(out + i, tl.fma(v, v, v), mask=i < size)


@triton.jit
def large_dot(out, x, size, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(size):
        a = tl.load(x + step * BLOCK * BLOCK + i)
        total = tl.dot(a, tl.trans(a), total)
    tl.store(out + i, total)


@triton.jit
def broken(out, x, size, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, 2 * BLOCK)))


@triton.jit
def method_of_size(out, x, size, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i).to(tl.float32) * size.to(tl.float32))
