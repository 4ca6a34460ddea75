"""The model of a supervised run: loaded, or with the first weights that transformers gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from softgrpo_engine.model.config import DecoderConfig
from softgrpo_engine.model.decoder import Decoder
from softgrpo_engine.model.weights import empty_decoder, load_decoder, load_weights


def master_weights(path: Path, from_scratch: bool, seed: int, device: torch.device) -> Decoder:
    """The float32 decoder of a model directory, in training mode. from_scratch: weights are drawn
    from the seed as transformers' model of that config.json draws them, those on disk not read."""
    if not from_scratch:
        return load_decoder(path, torch.float32, device).train()
    from transformers import AutoConfig, AutoModelForCausalLM

    decoder = empty_decoder(DecoderConfig.from_pretrained(path), torch.float32, device)
    config: Any = AutoConfig.from_pretrained(str(path))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drawn: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    load_weights(decoder, iter(drawn.state_dict().items()))
    return decoder.train()
