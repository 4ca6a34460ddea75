"""The decoder: one definition for the trainer and the engine, over packed tokens."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from softgrpo_engine.model.attention import Attention, PagedAttention
from softgrpo_engine.model.config import DecoderConfig
from softgrpo_engine.model.layers import DecoderLayer, FusedProjection, Linear, RMSNorm
from softgrpo_engine.model.packed_linear import PackedLinear
from softgrpo_engine.ops.decoder_layers import DecoderLayers


class DecoderStack(nn.Module):
    """Embedding table, blocks and final norm (``model.`` in Hugging Face names)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """Llama-family causal decoder over packed tokens; parameter names are Hugging Face's.

    The caller supplies input embeddings (a soft token is a mixture of rows of ``embed_weight``) and
    the attention, which knows how the T packed tokens form sequences.

    gradient_checkpointing: in training, keep only the residual stream between the layers and
    compute each layer again in the backward pass.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.model = DecoderStack(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self._packed_head: PackedLinear | None = None
        self._compiled: DecoderLayers | None = None
        inverse_frequencies, self.rope_scale = rope_parameters(config)
        self.register_buffer("inverse_frequencies", inverse_frequencies, persistent=False)

    @property
    def embed_weight(self) -> Tensor:
        """Input embeddings [V, H]."""
        return self.model.embed_tokens.weight

    @property
    def lm_head_weight(self) -> Tensor:
        """Output embeddings [V, H]; the input embeddings where the two are tied."""
        return self.embed_weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(
        self, inputs_embeds_TH: Tensor, positions_T: Tensor, attention: Attention
    ) -> Tensor:
        """Final hidden states [T, H] (after the last norm) of T packed tokens.

        inputs_embeds_TH in the dtype of the computation (in evaluation mode, that of the weights);
        positions_T int64, counted in each sequence.
        """
        rope = self.rope(positions_T)
        if self._compiled and not self.training and isinstance(attention, PagedAttention):
            return attention.through(self._compiled, inputs_embeds_TH, rope)
        x_TH, residual_TH = inputs_embeds_TH, None
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer in self.model.layers:
            block = partial(checkpoint, layer, use_reentrant=False) if recompute else layer
            x_TH, residual_TH = block(x_TH, residual_TH, rope, attention)
        return self.model.norm(x_TH, residual_TH)[0]

    def rope(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, head_dim] of the positions, fp32."""
        angles = positions_T[:, None].float() * self.get_buffer("inverse_frequencies")
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.rope_scale, angles.sin() * self.rope_scale

    def logits(self, hidden_RH: Tensor) -> Tensor:
        """Logits [R, V] in the dtype of the weights."""
        if self._packed_head is not None and not self.training:
            return self._packed_head(hidden_RH)
        return F.linear(hidden_RH, self.lm_head_weight)

    def pack(self, *, batch_invariant: bool = False) -> None:
        """Lays the weights out for inference. Call it after loading and after every update.

        batch_invariant: every product by a kernel whose rows do not depend on the batch; a
        ValueError where there is none.
        """
        self.eval()
        for module in self.modules():
            for projection in vars(module).values():
                if isinstance(projection, FusedProjection):
                    projection.pack(batch_invariant)
        self._packed_head = PackedLinear(self.lm_head_weight, batch_invariant=batch_invariant)
        self._compiled = self._compile()

    def tensors(self) -> list[Tensor]:
        """All that inference reads: parameters, buffers and packed weights."""
        packed = [
            projection.packed
            for module in self.modules()
            for projection in vars(module).values()
            if isinstance(projection, FusedProjection)
        ]
        weights = [w for p in (*packed, self._packed_head) if p is not None for w in p.tensors()]
        return [*self.parameters(), *self.buffers(), *weights]

    def _compile(self) -> DecoderLayers | None:
        """The layers as one C++ call, where all of their products are."""
        blocks = [block for block in self.model.layers if isinstance(block, DecoderLayer)]
        compiled = [w for w in (block.compiled_weights() for block in blocks) if w is not None]
        if len(compiled) < len(blocks):
            return None
        config = self.config
        return DecoderLayers(
            compiled,
            self.model.norm.weight.detach(),
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            eps=config.rms_norm_eps,
        )


def rope_parameters(config: DecoderConfig) -> tuple[Tensor, float]:
    """Inverse frequencies [head_dim / 2] and the factor on cos and sin, as in transformers."""
    parameters = config.rope.rope_parameters
    rope_type = parameters.get("rope_type", "default")
    if rope_type != "default":
        return ROPE_INIT_FUNCTIONS[rope_type](config.rope)
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return 1.0 / parameters["rope_theta"] ** exponents, 1.0
