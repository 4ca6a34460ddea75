"""A tiny decoder of every family, and its twin in transformers."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from softgrpo_engine.model.config import DecoderConfig
from softgrpo_engine.model.decoder import Decoder
from softgrpo_engine.model.weights import load_weights

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Each family reaches a branch of its own: llama3 RoPE, untied head, qkv bias, qk-norm.
FAMILIES = {
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama3-rope-untied": (
        "llama",
        {"tie_word_embeddings": False, "rope_parameters": LLAMA3_ROPE},
    ),
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"tie_word_embeddings": False, "sliding_window": None}),
}


def make_pair(family, dtype=torch.float32):
    name, extra = FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SHAPE, **extra)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()
    for parameter_name, parameter in theirs.named_parameters():
        if "norm" in parameter_name or "bias" in parameter_name:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in parameter_name else 0.0, 0.3)
    ours = Decoder(DecoderConfig.from_hf(theirs.config)).to(dtype)
    load_weights(ours, ((k, v) for k, v in theirs.state_dict().items()))
    return theirs, ours
