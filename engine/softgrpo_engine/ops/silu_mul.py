"""The activation of SwiGLU.

Takes float32 and bfloat16: C++ on the CPU, Triton on CUDA and ROCm; other dtypes and devices, and a
CPU without the extension, take plain PyTorch. Records no gradient."""

from __future__ import annotations

from torch import Tensor

from softgrpo_engine.ops import reference
from softgrpo_engine.ops.checks import check_ranks, kernels_of


def silu_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU activation: [T, 2I] -> ``silu(gate) * up`` [T, I], gate being the first half.

    Rounded as Hugging Face: silu in fp32, rounded to the dtype, then the product in the dtype.
    """
    kernels = kernels_of(gate_up)
    if kernels is None:
        return reference.silu_mul(gate_up)
    check_ranks(gate_up, gate_up=(gate_up, 2))
    width = gate_up.shape[1]
    if width % 2:
        raise ValueError(f"silu_mul: needs an even last dimension [T, 2I], got {width}")
    return kernels.silu_mul(gate_up)
