"""Root-mean-square norm.

Takes float32 and bfloat16: C++ on the CPU, Triton on CUDA and ROCm; other dtypes and devices, and a
CPU without the extension, take plain PyTorch. Records no gradient."""

from __future__ import annotations

import math
from typing import overload

from torch import Tensor

from softgrpo_engine.ops import reference
from softgrpo_engine.ops.checks import check_ranks, kernels_of


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square norm over the last dimension, after an addition where a residual is given.

    Args:
        x: [T, H]; weight: [H] in x's dtype; residual: [T, H] or None.

    Returns:
        ``norm(x)``, or ``(norm(s), s)`` with ``s = residual + x``. Rounded as Hugging Face's Llama:
        normalised in fp32, rounded to the dtype, then multiplied by the weight in the dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    kernels = kernels_of(x)
    if kernels is None:
        return reference.rms_norm(x, weight, eps, residual)
    check_ranks(x, x=(x, 2), weight=(weight, 1))
    hidden = x.shape[1]
    if weight.shape[0] != hidden or weight.dtype != x.dtype:
        raise ValueError(
            f"rms_norm: weight must be {x.dtype} [{hidden}], as x is, not "
            f"{weight.dtype} {list(weight.shape)}"
        )
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"rms_norm: eps must be >= 0 and finite, not {eps}")
    if residual is not None:
        check_ranks(x, residual=(residual, 2))
        if residual.shape != x.shape or residual.dtype != x.dtype:
            raise ValueError("rms_norm: residual must have the shape and dtype of x")
    return kernels.rms_norm(x, weight, eps, residual)
