"""The activation of SwiGLU in Triton.

Meaning: `softgrpo_engine.ops.reference`, whose roundings it has. The launch follows from
shapes, so that nothing waits for the device and a CUDA graph can hold it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from softgrpo_kernels.gpu.rounding import rounded

# Four numbers a thread: a row of a decode step is a few KB, and many programs read it sooner.
BLOCK_I = 512


@triton.jit
def silu_mul_kernel(out, gate_up, width, BLOCK_I: tl.constexpr):
    """Program (t, b): block b of row t."""
    dtype = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside, gate = i < width, gate_up + row * 2 * width
    g_I = tl.load(gate + i, mask=inside, other=0.0).to(tl.float32)
    u_I = tl.load(gate + width + i, mask=inside, other=0.0).to(tl.float32)
    g_I = rounded(tl.div_rn(g_I, 1.0 + tl.exp(-g_I)), dtype).to(tl.float32)
    tl.store(out + row * width + i, rounded(g_I * u_I, dtype), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `softgrpo_engine.ops.silu_mul`."""
    gate_up = gate_up.contiguous()
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    if out.numel():
        silu_mul_kernel[(rows, triton.cdiv(width, BLOCK_I))](
            out, gate_up, width, BLOCK_I=BLOCK_I, enable_fp_fusion=False
        )
    return out
