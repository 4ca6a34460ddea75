"""The decoder's projections for inference: laid out once for the machine's fastest product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softgrpo_engine.ops.packed_linear import PackedWeight, is_fastest, pack_weight, packed_linear
from softgrpo_engine.ops.silu_mul import silu_mul


class PackedLinear:
    """``x @ weight.T + bias``, or SwiGLU's ``silu(gate) * up`` of it.

    It is our own kernel where that is the fastest (`is_fastest`: CPUs with AVX2 or more); its rows
    do not depend on the batch. Other CPUs take oneDNN's prepacked bf16 product where there is one;
    its two operators are the ones Inductor uses for frozen weights, private to PyTorch, so their
    absence means ``F.linear``. ``batch_invariant`` asks for our kernel whatever the machine; on a
    GPU there is none.

    weight [N, K], bias [N] or None; x [T, K] -> [T, N], or [T, N / 2] with silu_mul, where the rows
    of the weight are those of gate, then of up.
    """

    def __init__(
        self,
        weight_NK: Tensor,
        bias_N: Tensor | None = None,
        *,
        silu_mul: bool = False,
        batch_invariant: bool = False,
    ) -> None:
        self._bias, self._silu_mul = bias_N, silu_mul
        self.ours: PackedWeight | None = None  # with our kernel
        self._onednn = self._weight = None
        on_cpu = weight_NK.device.type == "cpu"  # also a GPU's host has instructions
        if batch_invariant or (on_cpu and is_fastest(weight_NK.dtype)):
            self.ours = pack_weight(weight_NK, bias_N, silu_mul=silu_mul)
            if batch_invariant and not self.ours.is_compiled:
                raise ValueError(
                    "batch_invariant=True needs the C++ kernels, float32 or bfloat16 weights on "
                    f"the CPU and even sizes, not {weight_NK.dtype} {list(weight_NK.shape)} on "
                    f"{weight_NK.device}"
                )
        else:
            self._onednn = _prepacked(weight_NK)
            self._weight = weight_NK if self._onednn is None else None

    @property
    def keeps_weight(self) -> bool:
        """Whether it computes with the tensors that it was given: a change of them is seen here."""
        return self._weight is not None

    def tensors(self) -> list[Tensor]:
        """What it reads (not oneDNN's opaque weight)."""
        ours = (None, None) if self.ours is None else (self.ours.data, self.ours.bias)
        return [tensor for tensor in (*ours, self._weight, self._bias) if tensor is not None]

    def __call__(self, x_TK: Tensor) -> Tensor:
        if self.ours is not None:
            return packed_linear(x_TK, self.ours)
        if self._onednn is not None:
            product = torch.ops.mkldnn._linear_pointwise(
                x_TK, self._onednn, self._bias, "none", [], ""
            )
        else:
            assert self._weight is not None
            product = F.linear(x_TK, self._weight, self._bias)
        return silu_mul(product) if self._silu_mul else product


def fused(
    layers: Sequence[nn.Linear], *, silu_mul: bool = False, batch_invariant: bool = False
) -> PackedLinear:
    """Linear layers that read the same input as one product, their outputs side by side.

    The layers keep their weights, which become views of one where that is what is computed with.
    """
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    weight, bias = _joined(weights), None if biases[0] is None else _joined(biases)
    packed = PackedLinear(weight, bias, silu_mul=silu_mul, batch_invariant=batch_invariant)
    if packed.keeps_weight:
        _share(weights, weight)
        if bias is not None:
            _share(biases, bias)
    return packed


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts: the memory that they share if they do, else a copy."""
    first, end = parts[0], parts[0].data_ptr()
    storage = first.untyped_storage().data_ptr()
    for part in parts:
        if part.data_ptr() != end or part.untyped_storage().data_ptr() != storage:
            return torch.cat([part.detach() for part in parts])
        end += part.nbytes
    rows = sum(len(part) for part in parts)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def _share(parts: Sequence[Tensor], whole: Tensor) -> None:
    """Makes the parts views of the whole: it costs no second copy of the weights, and what is
    written into a part is in the whole, where a CUDA graph reads it."""
    for part, rows in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = rows


def _prepacked(weight_NK: Tensor) -> Tensor | None:
    supported = (
        weight_NK.device.type == "cpu"
        and weight_NK.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    if not supported:
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach().contiguous(), None)
