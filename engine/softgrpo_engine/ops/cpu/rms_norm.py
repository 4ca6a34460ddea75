"""Root-mean-square norm in C++. Meaning: `softgrpo_engine.ops.reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_engine.ops.extension import compiled

# Parts of the rows, each with its own sum of the weight's gradient: always the same, so that it has
# the same bits whatever the threads.
PARTS = 32


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """See `softgrpo_engine.ops.rms_norm`. The weight may have another dtype, a master's."""
    x, weight = x.contiguous(), weight.to(x.dtype).contiguous()
    residual = None if residual is None else residual.contiguous()
    out = torch.empty_like(x)
    total = None if residual is None else torch.empty_like(x)
    compiled().rms_norm(
        out.data_ptr(),
        0 if total is None else total.data_ptr(),
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        *x.shape,
        eps,
        x.dtype == torch.bfloat16,
    )
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
    """See `softgrpo_engine.ops.gpu.rms_norm_backward`."""
    total, d_out, rounded = total.contiguous(), d_out.contiguous(), weight.to(total.dtype)
    d_sum = None if d_sum is None else d_sum.contiguous()
    rows, hidden = total.shape
    d_total, parts = torch.empty_like(total), min(rows, PARTS)
    d_weights = torch.zeros(parts, hidden) if need_weight else None
    if rows:
        compiled().rms_norm_backward(
            d_total.data_ptr(),
            0 if d_weights is None else d_weights.data_ptr(),
            d_out.data_ptr(),
            0 if d_sum is None else d_sum.data_ptr(),
            total.data_ptr(),
            rounded.contiguous().data_ptr(),
            rows,
            hidden,
            parts,
            eps,
            total.dtype == torch.bfloat16,
        )
    return d_total, None if d_weights is None else d_weights.sum(0).to(weight.dtype)
