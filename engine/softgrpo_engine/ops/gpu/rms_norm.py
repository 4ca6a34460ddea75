"""Root-mean-square norm in Triton.

Meaning: `softgrpo_engine.ops.reference`, whose roundings it has. The launch follows from
shapes, so that nothing waits for the device and a CUDA graph can hold it."""

from __future__ import annotations

from typing import overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from softgrpo_kernels.gpu.rounding import rounded

# Programs of the backward pass: about four for each multiprocessor of a large GPU. They are the
# same on all, so that a gradient of the weight has the same bits.
PROGRAMS = 512


@triton.jit
def rms_norm_kernel(
    out, total, x, residual, weight, width, eps, RESIDUAL: tl.constexpr, BLOCK_H: tl.constexpr
):  # fmt: skip
    """Program t: row t, added to its residual first where there is one."""
    dtype = out.dtype.element_ty
    h = tl.arange(0, BLOCK_H)
    inside, place = h < width, tl.program_id(0).to(tl.int64) * width + h
    x_H = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        x_H += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        x_H = rounded(x_H, dtype)
        tl.store(total + place, x_H, mask=inside)
        x_H = x_H.to(tl.float32)
    scale = tl.rsqrt(tl.div_rn(tl.sum(x_H * x_H, axis=0), tl.cast(width, tl.float32)) + eps)
    x_H = rounded(x_H * scale, dtype).to(tl.float32)
    w_H = _weight(weight, h, inside, dtype)
    tl.store(out + place, rounded(w_H * x_H, dtype), mask=inside)


@triton.jit
def _weight(weight, h, inside, dtype: tl.constexpr):
    """fp32, rounded to the dtype of the computation: it may be a master weight."""
    w_H = tl.load(weight + h, mask=inside, other=0.0).to(tl.float32)
    return rounded(w_H, dtype).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_backward_kernel(
    d_total, d_weights, d_out, d_sum, total, weight, rows, width, eps,
    SUM: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Program p of P: rows p, p + P, ..., and p's part of the weight's gradient, fp32 [P, H].

    n = s / rms(s); ds = (w g - n mean(w g n)) / rms(s), plus the gradient that s has elsewhere.
    """
    dtype = d_total.dtype.element_ty
    h = tl.arange(0, BLOCK_H)
    inside, size = h < width, tl.cast(width, tl.float32)
    w_H = _weight(weight, h, inside, dtype)
    sum_H = tl.zeros([BLOCK_H], tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        place = tl.cast(row, tl.int64) * width + h
        n_H = tl.load(total + place, mask=inside, other=0.0).to(tl.float32)
        g_H = tl.load(d_out + place, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.div_rn(tl.sum(n_H * n_H, axis=0), size) + eps)
        n_H *= scale
        if WEIGHT:
            sum_H += g_H * rounded(n_H, dtype).to(tl.float32)
        g_H *= w_H
        g_H = (g_H - n_H * tl.div_rn(tl.sum(g_H * n_H, axis=0), size)) * scale
        if SUM:
            g_H += tl.load(d_sum + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_total + place, rounded(g_H, dtype), mask=inside)
    if WEIGHT:
        tl.store(d_weights + tl.program_id(0) * width + h, sum_H, mask=inside)


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """See `softgrpo_engine.ops.rms_norm`. The weight may have another dtype, a master's."""
    x = x.contiguous()
    rows, width = x.shape
    out = torch.empty_like(x)
    total = None if residual is None else torch.empty_like(x)
    if rows:
        rms_norm_kernel[(rows,)](
            out, total, x, None if residual is None else residual.contiguous(),
            weight.contiguous(), width, eps, RESIDUAL=residual is not None,
            BLOCK_H=triton.next_power_of_2(width), num_warps=8,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out if total is None else (out, total)


def rms_norm_backward(
    d_out: Tensor,
    d_sum: Tensor | None,
    total: Tensor,
    weight: Tensor,
    eps: float,
    *,
    need_weight: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``out = norm(total)``: that of total [T, H], and the weight's [H] in its dtype.

    d_sum: [T, H], the gradient that total has from elsewhere, or None. The weight's is summed in
    fp32, always in the same order.
    """
    total = total.contiguous()
    rows, width = total.shape
    d_total, programs = torch.empty_like(total), min(rows, PROGRAMS)
    d_weights = None
    if need_weight:
        d_weights = torch.empty(programs, width, dtype=torch.float32, device=total.device)
    block = triton.next_power_of_2(width)
    if rows:
        rms_norm_backward_kernel[(programs,)](
            d_total, d_weights, d_out.contiguous(), None if d_sum is None else d_sum.contiguous(),
            total, weight.contiguous(), rows, width, eps, SUM=d_sum is not None,
            WEIGHT=need_weight, BLOCK_H=block, num_warps=8 if block <= 4096 else 16,
        )  # fmt: skip
    return d_total, None if d_weights is None else d_weights.sum(0).to(weight.dtype)
