"""The ops of a layer in training: forward and backward in Triton, or on a CPU in C++.

They have the roundings of `softgrpo_engine.model.layers`, and keep for the backward pass their
inputs alone, the norm the sum that the next layer keeps anyway. Differentiable once.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from softgrpo_engine.ops.extension import cpu_extension


def is_fused(x: Tensor) -> bool:
    """Whether these ops take x; otherwise the layers compute by PyTorch's."""
    if x.is_cuda:
        return x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    narrow = x.dtype in (torch.bfloat16, torch.float32)
    return x.is_cpu and narrow and cpu_extension() is not None


def _kernels(x: Tensor) -> ModuleType:
    if x.is_cuda:
        from softgrpo_engine.ops import gpu

        return gpu
    from softgrpo_engine.ops import cpu

    return cpu


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``(norm(residual + x), residual + x)``, [T, H] each; without a residual, x is the sum.

    weight: [H] in any dtype, a master's for instance; its gradient has its own.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if weight.shape != x.shape[1:]:
        raise ValueError(f"rms_norm: weight must be {list(x.shape[1:])}, not {list(weight.shape)}")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError("rms_norm: residual must have the shape and dtype of x")
    if residual is None:
        (out,) = _RMSNorm.apply(x, None, weight, eps)
        return out, x
    return _RMSNorm.apply(x, residual, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        if residual is None:
            ctx.save_for_backward(x, weight)
            return (_kernels(x).rms_norm(x, weight, eps),)
        out, total = _kernels(x).rms_norm(x, weight, eps, residual)
        ctx.save_for_backward(total, weight)
        return out, total

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_out: Tensor | None, d_sum: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        need_x, need_residual, need_weight, _ = ctx.needs_input_grad
        total, weight = ctx.saved_tensors
        d_total, d_weight = d_sum, None
        if d_out is not None:
            d_total, d_weight = _kernels(total).rms_norm_backward(
                d_out, d_sum, total, weight, ctx.eps, need_weight=need_weight
            )
        return d_total if need_x else None, d_total if need_residual else None, d_weight, None


def silu_mul(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """``silu(gate) * up`` [T, I] of two tensors [T, I], or of one [T, 2I], gate its first half.

    Raises:
        ValueError: two tensors of other shapes or dtypes.
    """
    if up is not None and (up.shape, up.dtype) != (gate.shape, gate.dtype):
        raise ValueError("silu_mul: up must have the shape and dtype of gate")
    return _SiluMul.apply(gate, up)


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _kernels(gate).silu_mul(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate, up = ctx.saved_tensors
        d_gate_up = _kernels(gate).silu_mul_backward(d_out, gate, up)
        if up is None:
            return d_gate_up, None
        d_gate, d_up = d_gate_up.chunk(2, dim=1)
        need_gate, need_up = ctx.needs_input_grad
        return d_gate if need_gate else None, d_up if need_up else None


def rotate_heads(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    copy_starts: Tensor,
    copies: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `softgrpo_engine.ops.gpu.rotate_heads`; differentiable in qkv."""
    return _RotateHeads.apply(qkv, cos, sin, copy_starts, copies, num_heads, num_kv_heads)


class _RotateHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(*arguments[:4])
        return _kernels(qkv).rotate_heads(qkv, *arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _kernels(grads[0]).rotate_heads_backward(*grads, *ctx.saved_tensors), *[None] * 6


def group_attention(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, groups: Tensor) -> Tensor:
    """See `softgrpo_engine.ops.cpu.group_attention`, on a CPU alone; differentiable in q, k, v."""
    return _GroupAttention.apply(q, k, v, spans, groups)


class _GroupAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Tensor) -> Tensor:
        out, lse = _kernels(arguments[0]).group_attention(*arguments)
        ctx.save_for_backward(out, lse, *arguments)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        return *_kernels(d_out).group_attention_backward(d_out, *ctx.saved_tensors), None, None
