"""What the decoder needs to know of a Hugging Face config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig

SUPPORTED_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
_STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a Llama-family decoder.

    ``max_position_embeddings`` is the longest sequence (tokens) whose attention is still the full
    causal one: a sliding window that the model really uses limits it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    eos_token_ids: tuple[int, ...]
    rope: Any  # the transformers config, from which the RoPE frequencies are computed

    @classmethod
    def from_pretrained(cls, path: str | Path) -> DecoderConfig:
        """Reads ``config.json`` (and ``generation_config.json``) of a local model directory.

        Raises ValueError when the architecture is not one of ``SUPPORTED_ARCHITECTURES``.
        """
        config = AutoConfig.from_pretrained(str(path))
        return cls.from_hf(config, _eos_token_ids(Path(path), config))

    @classmethod
    def from_hf(cls, config: Any, eos_token_ids: tuple[int, ...] | None = None) -> DecoderConfig:
        """Translates a transformers config object."""
        architecture = _architecture(config)
        rope_type = config.rope_parameters.get("rope_type", "default")
        if rope_type not in _STATIC_ROPE_TYPES:
            raise ValueError(
                f"RoPE type {rope_type!r} is not supported; supported: "
                f"{', '.join(_STATIC_ROPE_TYPES)}"
            )
        if getattr(config, "hidden_act", "silu") != "silu":
            raise ValueError(f"activation {config.hidden_act!r} is not supported; supported: silu")
        attention_bias = bool(getattr(config, "attention_bias", False))
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None)
            or config.hidden_size // config.num_attention_heads,
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=_full_attention_length(config),
            tie_word_embeddings=bool(config.tie_word_embeddings),
            qkv_bias=attention_bias or architecture == "Qwen2ForCausalLM",
            o_bias=attention_bias,
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            qk_norm=architecture == "Qwen3ForCausalLM",
            eos_token_ids=eos_token_ids
            if eos_token_ids is not None
            else _as_ids(config.eos_token_id),
            rope=config,
        )


def _architecture(config: Any) -> str:
    architectures = getattr(config, "architectures", None) or [type(config).__name__]
    name = architectures[0].replace("Config", "ForCausalLM")
    if name not in SUPPORTED_ARCHITECTURES:
        raise ValueError(
            f"model architecture {name!r} is not supported; supported: "
            f"{', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    return name


def _full_attention_length(config: Any) -> int:
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    windowed = layer_types is None or "sliding_attention" in layer_types
    if window and windowed:
        return min(window, config.max_position_embeddings)
    return config.max_position_embeddings


def _as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _eos_token_ids(path: Path, config: Any) -> tuple[int, ...]:
    """All ids that end a sequence: those of the generation config come first where it has any."""
    ids: tuple[int, ...] = ()
    if (path / "generation_config.json").exists():
        ids = _as_ids(GenerationConfig.from_pretrained(str(path)).eos_token_id)
    return ids or _as_ids(config.eos_token_id)
