"""Linear layers for training, in the dtype in which this machine multiplies fast."""

from __future__ import annotations

import functools
import platform
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


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
        return joined_linear(x, [weight], [] if bias is None else [bias])
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def joined_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """The outputs of several linear layers of x side by side, as one product.

    x: [..., K]. weights: [N_i, K] and biases [N_i] (or none of them), otherwise as for `linear`.
    Only these are kept for the backward pass, not what is rounded and joined: under FSDP that would
    be every layer's weights at once. In `product_dtype` operands are widened, which is exact: every
    result is rounded once, the gradient of a master not at all.
    """
    return _JoinedLinear.apply(x, len(weights), *weights, *biases)


class _JoinedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x, *parameters)
        ctx.count = count
        weights, biases = parameters[:count], parameters[count:]
        bias = _joined(biases, x) if biases else None
        return F.linear(x.to(product_dtype(x)), _joined(weights, x), bias).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        weights, needs = parameters[: ctx.count], ctx.needs_input_grad[2:]
        sizes = [len(weight) for weight in weights]
        d_x, d_out = None, d_out.to(product_dtype(x))
        if ctx.needs_input_grad[0]:
            d_x = (d_out @ _joined(weights, x)).to(x.dtype)
        grads: list[Tensor | None] = [None] * len(needs)
        d_rows = d_out.reshape(-1, d_out.shape[-1])
        if any(needs[: ctx.count]):
            x_rows = x.to(d_out.dtype).reshape(-1, x.shape[-1])
            grads[: ctx.count] = (d_rows.T @ x_rows).split(sizes)
        if any(needs[ctx.count :]):
            wide = torch.promote_types(x.dtype, torch.float32)
            grads[ctx.count :] = d_rows.sum(0, dtype=wide).split(sizes)
        kept = (
            grad.to(parameter.dtype) if need and grad is not None else None
            for grad, parameter, need in zip(grads, parameters, needs, strict=True)
        )  # fmt: skip
        return d_x, None, *kept


def _joined(parts: Sequence[Tensor], x: Tensor) -> Tensor:
    """Along the first dimension, rounded to x's dtype and in the dtype of products."""
    sizes = [len(part) for part in parts]
    joined = x.new_empty((sum(sizes), *parts[0].shape[1:]), dtype=product_dtype(x))
    for target, part in zip(joined.split(sizes), parts, strict=True):
        target.copy_(part.to(x.dtype) if joined.dtype != x.dtype else part)
    return joined
