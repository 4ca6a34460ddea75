"""All layers of a decoder in one C++ call: a step does not go back to Python between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softgrpo_engine.ops.checks import check_paging
from softgrpo_engine.ops.extension import cpu_extension
from softgrpo_engine.ops.packed_linear import PackedWeight


@dataclass(frozen=True)
class LayerWeights:
    """One pre-norm block: norms [H] (of the heads [D], or None), products packed by `pack_weight`.

    gate_up is packed with silu_mul.
    """

    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    qkv: PackedWeight
    output: PackedWeight
    gate_up: PackedWeight
    down: PackedWeight

    def addresses(self) -> list[int]:
        """In the order of DecoderLayer in csrc/decoder_layers.h."""
        norms = (self.input_norm, self.post_norm, self.q_norm, self.k_norm)
        matrices = (self.qkv, self.output, self.gate_up, self.down)
        tensors = [*norms, *(part for m in matrices for part in (m.data, m.bias))]
        return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


class DecoderLayers:
    """Llama-family blocks and the final norm, for inference on the CPU; float32 or bfloat16.

    Holds the weights that it was given: make a new one when they are packed again.

    layers: their weights, all in one dtype; final_norm: [H]; num_heads, num_kv_heads: Hq, Hkv.

    Raises:
        ValueError: a weight that the C++ kernels do not take.
    """

    def __init__(
        self,
        layers: list[LayerWeights],
        final_norm: Tensor,
        *,
        num_heads: int,
        num_kv_heads: int,
        eps: float,
    ) -> None:
        self.dtype = final_norm.dtype
        for layer in layers:
            for weight in (layer.qkv, layer.output, layer.gate_up, layer.down):
                if not weight.is_compiled or weight.data.dtype != self.dtype:
                    raise ValueError(f"every weight must be packed for C++ and {self.dtype}")
        self._layers, self._final_norm = layers, final_norm.contiguous()
        self._addresses = torch.tensor([layer.addresses() for layer in layers], dtype=torch.int64)
        self._heads = num_heads, num_kv_heads
        self._eps = eps

    def __call__(
        self,
        x_TH: Tensor,
        cos_TD: Tensor,
        sin_TD: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        slot_mapping: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        query_starts: Tensor | None,
    ) -> Tensor:
        """Normalised hidden states [T, H] of T packed tokens; stores their keys and values.

        Each product, norm and attention has the bits of `packed_linear`, `rms_norm`,
        `rope_store_kv` and `paged_attention`, whose arguments these are. k_pages, v_pages:
        [layers, P, Hkv, page_size, D], contiguous.

        Raises:
            ValueError: shapes or dtypes that do not fit, a slot or page outside the cache.
        """
        num_heads, num_kv_heads = self._heads
        rows, hidden = x_TH.shape
        layers, num_pages, _, page_size, head_dim = k_pages.shape
        if (
            x_TH.dtype != self.dtype
            or hidden != self._final_norm.shape[0]
            or layers != len(self._layers)
        ):
            raise ValueError(
                f"need {self.dtype} x [T, {self._final_norm.shape[0]}] and pages of "
                f"{len(self._layers)} layers, got {x_TH.dtype} {list(x_TH.shape)} and {layers}"
            )
        check_paging(
            x_TH, k_pages, v_pages, cos_TD, sin_TD, slot_mapping, block_table, seq_lens,
            query_starts, num_kv_heads,
        )  # fmt: skip
        kernels = cpu_extension()
        assert kernels is not None  # the weights are packed
        x_TH = x_TH.clone(memory_format=torch.contiguous_format)  # it is overwritten
        out_TH = torch.empty_like(x_TH)
        kernels.decoder_layers(
            out_TH.data_ptr(),
            x_TH.data_ptr(),
            self._addresses.data_ptr(),
            self._final_norm.data_ptr(),
            layers,
            hidden,
            self._layers[0].down.width,
            self._eps,
            cos_TD.data_ptr(),
            sin_TD.data_ptr(),
            k_pages.data_ptr(),
            v_pages.data_ptr(),
            slot_mapping.data_ptr(),
            block_table.data_ptr(),
            seq_lens.data_ptr(),
            0 if query_starts is None else query_starts.data_ptr(),
            rows,
            block_table.shape[0],
            block_table.shape[1],
            num_pages,
            page_size,
            num_heads,
            num_kv_heads,
            head_dim,
            head_dim**-0.5,
            self.dtype == torch.bfloat16,
        )
        return out_TH
