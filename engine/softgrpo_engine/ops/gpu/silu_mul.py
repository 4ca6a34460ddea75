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
# In training rows are many.
BACKWARD_BLOCK_I = 1024


@triton.jit
def silu_mul_kernel(out, gate, up, stride, width, BLOCK_I: tl.constexpr):
    """Program (t, b): block b of row t; rows of gate and up are `stride` apart."""
    dtype = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = i < width
    g_I = tl.load(gate + row * stride + i, mask=inside, other=0.0).to(tl.float32)
    u_I = tl.load(up + row * stride + i, mask=inside, other=0.0).to(tl.float32)
    g_I = rounded(tl.div_rn(g_I, 1.0 + tl.exp(-g_I)), dtype).to(tl.float32)
    tl.store(out + row * width + i, rounded(g_I * u_I, dtype), mask=inside)


@triton.jit
def silu_mul_backward_kernel(d_gate_up, d_out, gate, up, stride, width, BLOCK_I: tl.constexpr):
    """Program (t, b): both gradients of block b of row t.

    silu' = s (1 + g (1 - s)), s the sigmoid of g.
    """
    dtype = d_gate_up.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = i < width
    d_I = tl.load(d_out + row * width + i, mask=inside, other=0.0).to(tl.float32)
    g_I = tl.load(gate + row * stride + i, mask=inside, other=0.0).to(tl.float32)
    u_I = tl.load(up + row * stride + i, mask=inside, other=0.0).to(tl.float32)
    s_I = tl.div_rn(1.0, 1.0 + tl.exp(-g_I))
    d_gate = d_gate_up + row * 2 * width + i
    d_g_I = d_I * u_I * s_I * (1.0 + g_I * (1.0 - s_I))
    tl.store(d_gate, rounded(d_g_I, dtype), mask=inside)
    silu_I = rounded(g_I * s_I, dtype).to(tl.float32)
    tl.store(d_gate + width, rounded(d_I * silu_I, dtype), mask=inside)


def silu_mul(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """See `softgrpo_engine.ops.silu_mul`; up [T, I] may be a tensor of its own beside gate."""
    gate, up = _halves(gate, up)
    rows, width = gate.shape
    out = gate.new_empty(rows, width)
    if out.numel():
        silu_mul_kernel[(rows, triton.cdiv(width, BLOCK_I))](
            out, gate, up, gate.stride(0), width, BLOCK_I=BLOCK_I, enable_fp_fusion=False
        )
    return out


def silu_mul_backward(d_out: Tensor, gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Gradients [T, 2I] of gate and of up, side by side, as either form of `silu_mul`."""
    gate, up = _halves(gate, up)
    rows, width = gate.shape
    d_gate_up = gate.new_empty(rows, 2 * width)
    if d_gate_up.numel():
        silu_mul_backward_kernel[(rows, triton.cdiv(width, BACKWARD_BLOCK_I))](
            d_gate_up, d_out.contiguous(), gate, up, gate.stride(0), width, BLOCK_I=BACKWARD_BLOCK_I
        )
    return d_gate_up


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gate and up, whose rows are as far apart."""
    if up is not None:
        return gate.contiguous(), up.contiguous()
    gate, up = gate.contiguous().chunk(2, dim=1)
    return gate, up
