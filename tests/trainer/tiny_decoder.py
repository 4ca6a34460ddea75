"""A random decoder small enough to train in milliseconds."""

import torch
from transformers import AutoConfig

from softgrpo_engine.model.config import DecoderConfig
from softgrpo_engine.model.decoder import Decoder

CONFIG = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
}


def make_decoder(**changes):
    """The same weights at every call; `changes` of CONFIG."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **{**CONFIG, **changes})
    decoder = Decoder(DecoderConfig.from_hf(config))
    for name, parameter in decoder.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    return decoder
