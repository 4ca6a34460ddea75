"""Which back end runs an op: one meaning, a back end for every device.

CPU tensors go to C++ where it is built, CUDA tensors (ROCm's too) to Triton, all others to plain
PyTorch, as do dtypes that the faster back ends do not know.
"""

from __future__ import annotations

import torch

from softgrpo_kernels.extension import cpu_extension
from softgrpo_kernels.tensors import DTYPES

# The ops are `torch.ops.softgrpo_kernels.*`. Not `custom_op`: a call costs a decode step half as
# much.
LIBRARY = torch.library.Library("softgrpo_kernels", "FRAGMENT")

BACKENDS = ("auto", "reference", "cpu", "triton")


def backend_of(name: str, device: torch.device, *dtypes: torch.dtype) -> str:
    """The back end that `name` stands for on this device.

    Raises:
        ValueError: an unknown back end, or one that cannot take these tensors.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {name!r}")
    known = all(dtype in DTYPES for dtype in dtypes)
    compiled = known and device.type == "cpu" and cpu_extension() is not None
    if name == "cpu" and not compiled:
        raise ValueError(
            "backend 'cpu' needs the compiled extension and CPU tensors of float32, bfloat16 or "
            "float16"
        )
    if name == "triton" and not known:
        raise ValueError("backend 'triton' needs tensors of float32, bfloat16 or float16")
    if name != "auto":
        return name
    if known and device.type == "cuda":
        return "triton"
    return "cpu" if compiled else "reference"
