"""Models without their numbers: a directory as the hub has it, whose weights are a hole."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig, PretrainedConfig, Qwen2Config

from softgrpo.config import ConfigError
from softgrpo_engine.model.config import DecoderConfig
from softgrpo_engine.model.decoder import Decoder
from softgrpo_engine.model.source import resolve_model

# The models of the recipes, so that these can be planned without a network.
_QWEN = {"num_hidden_layers": 28, "tie_word_embeddings": False, "max_position_embeddings": 131072}
_SHAPES: dict[str, Any] = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": Qwen2Config(
        **_QWEN, vocab_size=151936, hidden_size=1536, intermediate_size=8960,
        num_attention_heads=12, num_key_value_heads=2,
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": Qwen2Config(
        **_QWEN, vocab_size=152064, hidden_size=3584, intermediate_size=18944,
        num_attention_heads=28, num_key_value_heads=4,
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": Qwen2Config(
        **(_QWEN | {"num_hidden_layers": 48}), vocab_size=152064, hidden_size=5120,
        intermediate_size=13824, num_attention_heads=40, num_key_value_heads=8,
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": Qwen2Config(
        **(_QWEN | {"num_hidden_layers": 64}), vocab_size=152064, hidden_size=5120,
        intermediate_size=27648, num_attention_heads=40, num_key_value_heads=8,
    ),
    "meta-llama/Llama-3.2-3B-Instruct": LlamaConfig(
        vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
        num_attention_heads=24, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        max_position_embeddings=131072,
    ),
}  # fmt: skip


def model_config(path: str) -> PretrainedConfig:
    """Of a local directory, an alias, one of the recipes' models, or a model on the hub.

    Raises ConfigError for a model that has none, or cannot be asked for it.
    """
    if path in _SHAPES:
        return _SHAPES[path]
    local = Path(path).is_dir() or "/" not in path
    try:
        return AutoConfig.from_pretrained(resolve_model(path) if local else path)
    except OSError as error:
        raise ConfigError(f"model.path: no config.json of {path!r}: {error}") from None


def write_empty_model(config: PretrainedConfig, layers: int, folder: Path) -> None:
    """A model directory of so many layers, its weights bfloat16: the file is as long as they are
    and takes no place on the disk."""
    values = config.to_dict() | {"num_hidden_layers": layers}
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][:layers]
    config = type(config).from_dict(values)
    config.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")  # a model has one, and nobody reads it
    with torch.device("meta"):
        decoder = Decoder(DecoderConfig.from_hf(config, ()))
    header, end = {}, 0
    for name, parameter in decoder.named_parameters():
        begin, end = end, end + 2 * parameter.numel()
        header[name] = {
            "dtype": "BF16",
            "shape": list(parameter.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
