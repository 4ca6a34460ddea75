"""The decoder: one definition for the trainer and the engine, over packed tokens."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from softgrpo_engine.model.attention import Attention
from softgrpo_engine.model.config import DecoderConfig
from softgrpo_engine.model.layers import DecoderLayer, Linear, RMSNorm
from softgrpo_engine.model.packed_decoder import PackedDecoder

# A layer draws nothing: no state of a generator is kept.
_recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


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
    the attention, which knows how the T packed tokens form sequences. The layers are what trains;
    in evaluation mode a packed decoder runs its `packed` copy of them.

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
        self._packed: PackedDecoder | None = None
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

    @property
    def packed(self) -> PackedDecoder | None:
        """What computes instead of the layers: after `pack`, in evaluation mode."""
        return None if self.training else self._packed

    def forward(
        self, inputs_embeds_TH: Tensor, positions_T: Tensor, attention: Attention
    ) -> Tensor:
        """Final hidden states [T, H] (after the last norm) of T packed tokens.

        inputs_embeds_TH in the dtype of the computation (in evaluation mode, that of the weights);
        positions_T int64, counted in each sequence.
        """
        rope = self.rope(positions_T)
        if self.packed is not None:
            return self.packed(inputs_embeds_TH, rope, attention)
        x_TH, residual_TH = inputs_embeds_TH, None
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer in self.model.layers:
            block = partial(_recomputed, layer) if recompute else layer
            x_TH, residual_TH = block(x_TH, residual_TH, rope, attention)
        return self.model.norm(x_TH, residual_TH)[0]

    def rope(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, head_dim] of the positions, fp32."""
        angles = positions_T[:, None].float() * self.get_buffer("inverse_frequencies")
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.rope_scale, angles.sin() * self.rope_scale

    def logits(self, hidden_RH: Tensor) -> Tensor:
        """Logits [R, V] in the dtype of the weights."""
        if self.packed is not None:
            return self.packed.logits(hidden_RH)
        return F.linear(hidden_RH, self.lm_head_weight)

    def pack(self, *, batch_invariant: bool = False) -> None:
        """Lays the weights out for inference. Call it after loading and after every update.

        batch_invariant: every product by a kernel whose rows do not depend on the batch; a
        ValueError where there is none.
        """
        self.eval()
        self._packed = None  # its memory is free for the new one
        self._packed = PackedDecoder(
            self.config,
            cast("Iterable[DecoderLayer]", self.model.layers),
            self.model.norm,
            self.lm_head_weight,
            batch_invariant=batch_invariant,
        )

    def tensors(self) -> list[Tensor]:
        """All that inference reads: parameters, buffers and packed weights."""
        packed = [] if self._packed is None else self._packed.tensors()
        return [*self.parameters(), *self.buffers(), *packed]


def rope_parameters(config: DecoderConfig) -> tuple[Tensor, float]:
    """Inverse frequencies [head_dim / 2] and the factor on cos and sin, as in transformers."""
    parameters = config.rope.rope_parameters
    rope_type = parameters.get("rope_type", "default")
    if rope_type != "default":
        return ROPE_INIT_FUNCTIONS[rope_type](config.rope)
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return 1.0 / parameters["rope_theta"] ** exponents, 1.0
