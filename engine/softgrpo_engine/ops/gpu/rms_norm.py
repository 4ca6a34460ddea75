"""Root-mean-square norm in Triton.

Meaning: `softgrpo_engine.ops.reference`, whose roundings it has. The launch follows from
shapes, so that nothing waits for the device and a CUDA graph can hold it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softgrpo_kernels.gpu.rounding import rounded


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
    w_H = tl.load(weight + h, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, rounded(w_H * x_H, dtype), mask=inside)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """See `softgrpo_engine.ops.rms_norm`."""
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
