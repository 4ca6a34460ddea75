"""What every op asks of its tensors before a back end gets their addresses."""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers of the dtypes in C++ (csrc/soft_embedding.h). Triton has kernels for the same.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over tensors of this dtype are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_stride(x: Tensor) -> Tensor:
    """x itself when its last axis is contiguous (rows may lie apart), else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def int32(ids: Tensor) -> Tensor:
    """Ids as the back ends read them; x itself where it is like that."""
    return ids.to(torch.int32).contiguous()


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """The values on the device, for work that is launched after this."""
    if values.device == device or device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
