"""The layers of the decoder. In training mode they are plain autograd PyTorch; in evaluation mode
they call the fused inference kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softgrpo_engine.model.attention import Attention
from softgrpo_engine.model.config import DecoderConfig
from softgrpo_engine.model.packed_linear import PackedLinear
from softgrpo_engine.ops.decoder_layers import LayerWeights
from softgrpo_engine.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square norm after a residual addition, rounded as Hugging Face's Llama does."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_TH: Tensor, residual_TH: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns ``(norm(residual + x), residual + x)``; without a residual, x is the residual."""
        if not self.training:
            if residual_TH is None:
                return rms_norm(x_TH, self.weight, self.eps), x_TH
            return rms_norm(x_TH, self.weight, self.eps, residual_TH)
        residual_TH = x_TH if residual_TH is None else residual_TH + x_TH
        return self.normalise(residual_TH), residual_TH

    def normalise(self, x_TH: Tensor) -> Tensor:
        """The norm alone, differentiable."""
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
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class FusedProjection:
    """Linear layers that read the same input, computed as one GEMM once packed; with silu_mul, the
    two of SwiGLU: ``silu(first) * second``.

    Holds no parameters: the layers stay where Hugging Face names them, and are looked up at each
    call, so that replacing one (LoRA, FSDP) is seen here.
    """

    def __init__(self, owner: nn.Module, *names: str, silu_mul: bool = False) -> None:
        self._owner = owner
        self._names = names
        self._silu_mul = silu_mul
        self.packed: PackedLinear | None = None

    def pack(self, batch_invariant: bool) -> None:
        layers = [getattr(self._owner, name) for name in self._names]
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        weight, bias = _joined(weights), None if biases[0] is None else _joined(biases)
        self.packed = PackedLinear(
            weight, bias, silu_mul=self._silu_mul, batch_invariant=batch_invariant
        )
        if self.packed.keeps_weight:
            _share(weights, weight)
            if bias is not None:
                _share(biases, bias)

    def __call__(self, x_TH: Tensor) -> Tensor:
        if self.packed is not None and not self._owner.training:
            return self.packed(x_TH)
        outputs = [getattr(self._owner, name)(x_TH) for name in self._names]
        if self._silu_mul:
            gate, up = outputs
            return F.silu(gate) * up
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _joined(parts: list[nn.Parameter]) -> Tensor:
    """The rows of all parts: the memory that they share if they do, else a copy."""
    first, end = parts[0], parts[0].data_ptr()
    storage = first.untyped_storage().data_ptr()
    for part in parts:
        if part.data_ptr() != end or part.untyped_storage().data_ptr() != storage:
            return torch.cat([part.detach() for part in parts])
        end += part.nbytes
    rows = sum(len(part) for part in parts)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def _share(parts: list[nn.Parameter], whole: Tensor) -> None:
    """Makes the parts views of the whole: it costs no second copy of the weights, and what is
    written into a part is in the whole, where a CUDA graph reads it."""
    for part, rows in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = rows


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
        self.qkv = FusedProjection(self, "q_proj", "k_proj", "v_proj")
        self.output = FusedProjection(self, "o_proj")

    def forward(self, x_TH: Tensor, rope: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        qkv_TE = self.qkv(x_TH)
        if self.q_norm is not None and self.k_norm is not None:
            qkv_TE = self._normalise_heads(qkv_TE, self.q_norm, self.k_norm)
        return self.output(attention(self.layer, qkv_TE, rope))

    def _normalise_heads(self, qkv_TE: Tensor, q_norm: RMSNorm, k_norm: RMSNorm) -> Tensor:
        config, length = self.config, qkv_TE.shape[0]
        sizes = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        q, k, v = qkv_TE.view(length, -1, config.head_dim).split(sizes, dim=1)
        heads = [q_norm.normalise(q), k_norm.normalise(k), v]
        return torch.cat(heads, dim=1).flatten(1)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(hidden, inner, bias=config.mlp_bias)
        self.up_proj = Linear(hidden, inner, bias=config.mlp_bias)
        self.down_proj = Linear(inner, hidden, bias=config.mlp_bias)
        self.activated = FusedProjection(self, "gate_proj", "up_proj", silu_mul=True)
        self.down = FusedProjection(self, "down_proj")

    def forward(self, x_TH: Tensor) -> Tensor:
        return self.down(self.activated(x_TH))


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
        self,
        x_TH: Tensor,
        residual_TH: Tensor | None,
        rope: tuple[Tensor, Tensor],
        attention: Attention,
    ) -> tuple[Tensor, Tensor]:
        x_TH, residual_TH = self.input_layernorm(x_TH, residual_TH)
        x_TH = self.self_attn(x_TH, rope, attention)
        x_TH, residual_TH = self.post_attention_layernorm(x_TH, residual_TH)
        return self.mlp(x_TH), residual_TH

    def compiled_weights(self) -> LayerWeights | None:
        """For `DecoderLayers`; None where a packed product is not that of the C++ kernel."""
        attention, mlp = self.self_attn, self.mlp
        projections = (attention.qkv, attention.output, mlp.activated, mlp.down)
        packed = [p.packed.ours for p in projections if p.packed is not None]
        weights = [w for w in packed if w is not None and w.is_compiled]
        if len(weights) < len(projections):
            return None
        heads = [
            norm.weight.detach().contiguous()
            for norm in (attention.q_norm, attention.k_norm)
            if norm is not None
        ]
        return LayerWeights(
            self.input_layernorm.weight.detach().contiguous(),
            self.post_attention_layernorm.weight.detach().contiguous(),
            *(heads or (None, None)),
            *weights,
        )
