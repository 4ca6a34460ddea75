"""Linear layers for inference, their weights packed once, whose rows do not depend on the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from softgrpo_engine.ops.extension import cpu_extension
from softgrpo_engine.ops.reference import silu_mul
from softgrpo_kernels.checks import check_device

_DTYPES = (torch.bfloat16, torch.float32)
_TILE, _BLOCK = 16, 32  # output columns, as in csrc/packed_linear.h
_AVX2 = 1  # as in csrc/shared/isa.h


@dataclass(frozen=True)
class PackedWeight:
    """A weight [N, K] laid out for `packed_linear`; see `pack_weight`.

    data: the tiles of csrc/packed_linear.h, or the weight itself where that cannot take it.
    """

    data: Tensor
    bias: Tensor | None
    columns: int
    width: int
    silu_mul: bool

    @property
    def is_compiled(self) -> bool:
        """Whether the C++ kernel computes it."""
        return self.data.dim() == 1


def matrix_unit() -> str:
    """What multiplies bf16 on this CPU: "amx", "avx512_bf16", or "" for fp32 lanes (or no C++)."""
    kernels = cpu_extension()
    return "" if kernels is None else kernels.matrix_unit()


def is_fastest(dtype: torch.dtype) -> bool:
    """Whether `packed_linear` is this CPU's fastest product at the batch sizes of decoding.

    From AVX2 on it is: one thread, 1 / 8 / 64 rows, against PyTorch's on AVX2 3 / 8 / 8 times in
    bfloat16 and 2 / 2.5 / 1.2 times in float32 (docs/performance.md). Arm has no product of ours
    that uses its instructions.
    """
    kernels = cpu_extension()
    return kernels is not None and dtype in _DTYPES and kernels.isa() >= _AVX2


def pack_weight(
    weight: Tensor, bias: Tensor | None = None, *, silu_mul: bool = False
) -> PackedWeight:
    """Lays a weight out for `packed_linear`. Pack again when it changes.

    Args:
        weight: [N, K]; bias: [N] or None.
        silu_mul: the rows are those of SwiGLU's gate, then of up: the product becomes
            ``silu(gate) * up`` [T, N / 2].

    Raises:
        ValueError: shapes that do not fit.
    """
    if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"need weight [N, K] and bias [N] or None, got {list(weight.shape)} and "
            f"{None if bias is None else list(bias.shape)}"
        )
    columns, width = weight.shape
    if silu_mul and columns % 2:
        raise ValueError(f"silu_mul needs the rows of gate and of up, not {columns} rows")
    weight = weight.detach()
    bias = None if bias is None else bias.detach()
    kernels = cpu_extension() if weight.is_cpu and weight.dtype in _DTYPES else None
    fits = width % 2 == 0 and not (silu_mul and columns % _BLOCK)
    if kernels is None or not fits:
        return PackedWeight(weight, bias, columns, width, silu_mul)
    padded = -(-columns // _BLOCK) * _BLOCK
    if silu_mul:  # tiles of gate and up take turns
        weight = weight.unflatten(0, (2, -1, _TILE)).transpose(0, 1)
        bias = None if bias is None else bias.view(2, -1, _TILE).transpose(0, 1).flatten()
    weight = weight.contiguous()
    data = weight.new_empty(padded * width)
    kernels.pack_linear(
        data.data_ptr(), weight.data_ptr(), columns, width, weight.dtype == torch.bfloat16
    )
    if bias is not None:
        bias = F.pad(bias.float(), (0, padded - columns))
    return PackedWeight(data, bias, columns, width, silu_mul)


def packed_linear(x: Tensor, weight: PackedWeight) -> Tensor:
    """``x @ weight.T + bias``, or ``silu(gate) * up`` of it, for inference: no gradient.

    Args:
        x: [T, K] in the weight's dtype, float32 or bfloat16 for the C++ kernel.

    Returns:
        [T, N] (or [T, N / 2]) in x's dtype, rounded once; gate, up and silu(gate) are each rounded
        as separate operations would. On the CPU each element is one fp32 sum in an order of its
        own, so that a row has the same bits in any batch and with any number of threads.

    Raises:
        ValueError: a shape or dtype that does not fit.
    """
    if x.dim() != 2 or x.shape[1] != weight.width or x.dtype != weight.data.dtype:
        raise ValueError(
            f"x must be {weight.data.dtype} [T, {weight.width}], not {x.dtype} {list(x.shape)}"
        )
    check_device("x", x, weight.data.device)
    kernels = cpu_extension() if weight.is_compiled else None
    if kernels is None:
        product = F.linear(x, weight.data, weight.bias)
        return silu_mul(product) if weight.silu_mul else product
    x = x.contiguous()
    rows, columns = x.shape[0], weight.columns
    out = x.new_empty(rows, columns // 2 if weight.silu_mul else columns)
    kernels.linear(
        out.data_ptr(),
        x.data_ptr(),
        weight.data.data_ptr(),
        0 if weight.bias is None else weight.bias.data_ptr(),
        rows,
        weight.width,
        columns,
        weight.silu_mul,
        x.dtype == torch.bfloat16,
    )
    return out
