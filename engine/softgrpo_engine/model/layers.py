"""The layers of the decoder: what they compute, in plain PyTorch, and how they train.

Norms, activations and projections of one input train by fused ops of the same roundings, where a
device has them (`softgrpo_engine.ops.differentiable`).
Their inference is `softgrpo_engine.model.packed_decoder`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softgrpo_engine.model.attention import Attention, Rope
from softgrpo_engine.model.config import DecoderConfig
from softgrpo_engine.ops import differentiable
from softgrpo_engine.ops.linear import joined_linear, linear


class RMSNorm(nn.Module):
    """Root-mean-square norm after a residual addition, rounded as Hugging Face's Llama does."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_TH: Tensor, residual_TH: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns ``(norm(residual + x), residual + x)``; without a residual, x is the residual."""
        if differentiable.is_fused(x_TH):
            return differentiable.rms_norm(x_TH, residual_TH, self.weight, self.eps)
        residual_TH = x_TH if residual_TH is None else residual_TH + x_TH
        return self.normalise(residual_TH), residual_TH

    def normalise(self, x_TH: Tensor) -> Tensor:
        """The norm alone."""
        x32 = x_TH.float() if x_TH.dtype != torch.float64 else x_TH
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x_TH.dtype) * x32.to(x_TH.dtype)


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input.

    In training the weights are float32 masters and the activations bfloat16: casting at the place
    of use keeps the gradient of the master in its precision, and lets a checkpointed layer cast
    again instead of keeping the copy.
    """

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def _joined(x: Tensor, *projections: nn.Module) -> Tensor | None:
    """Their outputs side by side, by one product; None where there are no fused ops, and where
    one is not `Linear`: an adapter has products of its own."""
    plain = [p for p in projections if isinstance(p, Linear)]
    if not differentiable.is_fused(x) or len(plain) < len(projections):
        return None
    biases = [p.bias for p in plain if p.bias is not None]
    return joined_linear(x, [p.weight for p in plain], biases)


class SelfAttention(nn.Module):
    """Projections around an attention that the caller supplies (paged, or packed for training)."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, config.head_dim
        kv_size = config.num_kv_heads * head_dim
        self.config = config
        self.layer = layer
        self.q_proj = Linear(hidden, config.num_heads * head_dim, bias=config.qkv_bias)
        self.k_proj = Linear(hidden, kv_size, bias=config.qkv_bias)
        self.v_proj = Linear(hidden, kv_size, bias=config.qkv_bias)
        self.o_proj = Linear(config.num_heads * head_dim, hidden, bias=config.o_bias)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x_TH: Tensor, rope: Rope, attention: Attention) -> Tensor:
        projections = self.q_proj, self.k_proj, self.v_proj
        qkv_TE = _joined(x_TH, *projections)
        if qkv_TE is None:
            qkv_TE = torch.cat([project(x_TH) for project in projections], dim=-1)
        return self.o_proj(attention(self.layer, self.normalise_heads(qkv_TE), rope))

    def normalise_heads(self, qkv_TE: Tensor) -> Tensor:
        """The heads of q and of k normalised, in a model that does so."""
        if self.q_norm is None or self.k_norm is None:
            return qkv_TE
        config, length = self.config, qkv_TE.shape[0]
        sizes = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        q, k, v = qkv_TE.view(length, -1, config.head_dim).split(sizes, dim=1)
        heads = [self.q_norm.normalise(q), self.k_norm.normalise(k), v]
        return torch.cat(heads, dim=1).flatten(1)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(hidden, inner, bias=config.mlp_bias)
        self.up_proj = Linear(hidden, inner, bias=config.mlp_bias)
        self.down_proj = Linear(inner, hidden, bias=config.mlp_bias)

    def forward(self, x_TH: Tensor) -> Tensor:
        gate_up = _joined(x_TH, self.gate_proj, self.up_proj)
        if gate_up is not None:
            return self.down_proj(differentiable.silu_mul(gate_up))
        gate, up = self.gate_proj(x_TH), self.up_proj(x_TH)
        if differentiable.is_fused(gate):
            return self.down_proj(differentiable.silu_mul(gate, up))
        return self.down_proj(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    """Pre-norm block. The residual stream travels beside x, so that each norm adds and normalises
    in one pass."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x_TH: Tensor, residual_TH: Tensor | None, rope: Rope, attention: Attention
    ) -> tuple[Tensor, Tensor]:
        x_TH, residual_TH = self.input_layernorm(x_TH, residual_TH)
        x_TH = self.self_attn(x_TH, rope, attention)
        x_TH, residual_TH = self.post_attention_layernorm(x_TH, residual_TH)
        return self.mlp(x_TH), residual_TH
