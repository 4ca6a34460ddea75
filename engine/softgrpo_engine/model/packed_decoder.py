"""The decoder for inference: fused kernels over weights that were laid out once.

`softgrpo_engine.model.layers` says what is computed. Norms and tables are read where they stand,
the projections from their packed copies: pack again after an update.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import Tensor

from softgrpo_engine.model.attention import Attention, PagedAttention, Rope
from softgrpo_engine.model.config import DecoderConfig
from softgrpo_engine.model.layers import DecoderLayer, RMSNorm
from softgrpo_engine.model.projections import PackedLinear, fused
from softgrpo_engine.ops.decoder_layers import DecoderLayers, LayerWeights
from softgrpo_engine.ops.rms_norm import rms_norm


class PackedDecoder:
    """The layers, the final norm and the head; where all products are ours, the layers are one C++
    call for paged attention.

    batch_invariant: every product by a kernel whose rows do not depend on the batch; a ValueError
    where there is none.
    """

    def __init__(
        self,
        config: DecoderConfig,
        layers: Iterable[DecoderLayer],
        norm: RMSNorm,
        lm_head_weight: Tensor,
        *,
        batch_invariant: bool,
    ) -> None:
        self.layers = [PackedLayer(layer, batch_invariant) for layer in layers]
        self.head = PackedLinear(lm_head_weight, batch_invariant=batch_invariant)
        self.one_call = _one_call(config, self.layers, norm)
        self._norm = norm

    def __call__(self, x_TH: Tensor, rope: Rope, attention: Attention) -> Tensor:
        """Normalised hidden states [T, H] of input embeddings [T, H]."""
        if self.one_call is not None and isinstance(attention, PagedAttention):
            return attention.through(self.one_call, x_TH, rope)
        residual_TH = None
        for layer in self.layers:
            x_TH, residual_TH = layer(x_TH, residual_TH, rope, attention)
        return _normed(self._norm, x_TH, residual_TH)[0]

    def logits(self, hidden_RH: Tensor) -> Tensor:
        """[R, V] in the dtype of the weights."""
        return self.head(hidden_RH)

    def tensors(self) -> list[Tensor]:
        """What the products read."""
        products = [product for layer in self.layers for product in layer.products]
        return [tensor for product in (*products, self.head) for tensor in product.tensors()]


class PackedLayer:
    """One block: its projections packed, SwiGLU's activation with those of gate and up."""

    def __init__(self, layer: DecoderLayer, batch_invariant: bool) -> None:
        pack = partial(fused, batch_invariant=batch_invariant)
        attention, mlp = layer.self_attn, layer.mlp
        self._layer = layer
        self.qkv = pack([attention.q_proj, attention.k_proj, attention.v_proj])
        self.output = pack([attention.o_proj])
        self.gate_up = pack([mlp.gate_proj, mlp.up_proj], silu_mul=True)
        self.down = pack([mlp.down_proj])

    @property
    def products(self) -> tuple[PackedLinear, ...]:
        return self.qkv, self.output, self.gate_up, self.down

    def __call__(
        self, x_TH: Tensor, residual_TH: Tensor | None, rope: Rope, attention: Attention
    ) -> tuple[Tensor, Tensor]:
        layer = self._layer
        x_TH, residual_TH = _normed(layer.input_layernorm, x_TH, residual_TH)
        qkv_TE = layer.self_attn.normalise_heads(self.qkv(x_TH))
        x_TH = self.output(attention(layer.self_attn.layer, qkv_TE, rope))
        x_TH, residual_TH = _normed(layer.post_attention_layernorm, x_TH, residual_TH)
        return self.down(self.gate_up(x_TH)), residual_TH

    def weights(self) -> LayerWeights | None:
        """For `DecoderLayers`; None where a product is not that of the C++ kernel."""
        packed = [p.ours for p in self.products if p.ours is not None and p.ours.is_compiled]
        if len(packed) < len(self.products):
            return None
        attention = self._layer.self_attn
        heads = [
            None if norm is None else norm.weight.detach().contiguous()
            for norm in (attention.q_norm, attention.k_norm)
        ]
        return LayerWeights(
            self._layer.input_layernorm.weight.detach().contiguous(),
            self._layer.post_attention_layernorm.weight.detach().contiguous(),
            heads[0],
            heads[1],
            *packed,
        )


def _normed(norm: RMSNorm, x_TH: Tensor, residual_TH: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(norm(residual + x), residual + x)``; without a residual, x is the residual."""
    if residual_TH is None:
        return rms_norm(x_TH, norm.weight, norm.eps), x_TH
    return rms_norm(x_TH, norm.weight, norm.eps, residual_TH)


def _one_call(
    config: DecoderConfig, layers: list[PackedLayer], norm: RMSNorm
) -> DecoderLayers | None:
    weights = [found for found in (layer.weights() for layer in layers) if found is not None]
    if len(weights) < len(layers):
        return None
    return DecoderLayers(
        weights,
        norm.weight.detach(),
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        eps=config.rms_norm_eps,
    )
