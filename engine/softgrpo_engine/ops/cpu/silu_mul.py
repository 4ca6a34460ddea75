"""The activation of SwiGLU in C++. Meaning: `softgrpo_engine.ops.reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_engine.ops.extension import compiled


def silu_mul(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """See `softgrpo_engine.ops.silu_mul`; up [T, I] may be a tensor of its own beside gate."""
    gate, up = _halves(gate, up)
    rows, width = gate.shape
    out = gate.new_empty(rows, width)
    compiled().silu_mul(out.data_ptr(), *_layout(gate, up))
    return out


def silu_mul_backward(d_out: Tensor, gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Gradients [T, 2I] of gate and of up, side by side, as either form of `silu_mul`."""
    gate, up = _halves(gate, up)
    rows, width = gate.shape
    d_gate_up, d_out = gate.new_empty(rows, 2 * width), d_out.contiguous()
    compiled().silu_mul_backward(d_gate_up.data_ptr(), d_out.data_ptr(), *_layout(gate, up))
    return d_gate_up


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gate and up, whose rows are as far apart."""
    if up is not None:
        return gate.contiguous(), up.contiguous()
    gate, up = gate.contiguous().chunk(2, dim=1)
    return gate, up


def _layout(gate: Tensor, up: Tensor) -> tuple[int, ...]:
    bf16 = gate.dtype == torch.bfloat16
    return gate.data_ptr(), up.data_ptr(), gate.stride(0), *gate.shape, bf16
