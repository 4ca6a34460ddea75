"""Linear layers for training, in the dtype in which this machine multiplies fast."""

from __future__ import annotations

import functools
import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def has_bf16_products() -> bool:
    """Whether this CPU has instructions that multiply bfloat16 and PyTorch uses them.

    oneDNN takes bfloat16 on every AVX-512; without AVX512-BF16 it converts inside its loops.
    """
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported()
    onednn = torch.backends.mkldnn.is_available()  # without it there are no such operators
    return bool(onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype for the matrix products of training: that of x, but float32 for bfloat16 on a CPU
    without instructions for it, where PyTorch's bfloat16 products are 6 to 20 times slower."""
    slow = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not has_bf16_products()
    return torch.float32 if slow else x.dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` in x's dtype, differentiable; sums are float32 for bfloat16.

    x: [..., K]. weight: [N, K] and bias [N] or None in any dtype, master weights for instance; they
    are rounded to that of x here, and the gradient has their own.
    """
    if product_dtype(x) != x.dtype:
        return _WidenedLinear.apply(x, weight, bias)
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class _WidenedLinear(torch.autograd.Function):
    """bfloat16 operands as float32 for each product: exact, and every result is rounded once. What
    is kept for the backward pass stays bfloat16; the gradient of master weights is not rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        rounded = None if bias is None else _widened(bias, x.dtype)
        return F.linear(x.float(), _widened(weight, x.dtype), rounded).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        d_out = d_out.float()
        rows = d_out.reshape(-1, d_out.shape[-1])
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = (d_out @ _widened(weight, x.dtype)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            d_weight = (rows.T @ x.float().reshape(-1, x.shape[-1])).to(weight.dtype)
        if bias is not None and ctx.needs_input_grad[2]:
            d_bias = rows.sum(0).to(bias.dtype)
        return d_x, d_weight, d_bias


def _widened(master: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to the dtype of the computation, as float32."""
    return master.to(dtype).float()
