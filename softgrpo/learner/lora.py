"""Low-rank adapters (LoRA, arXiv 2106.09685) of `peft` on the decoder.

`peft` wraps the decoder's q_proj ... down_proj where they stand: in training each is a linear layer
of its own with its Hugging Face name, only the engine's copy fuses them. So nothing has to be
split: the engine receives the merged weights, and the adapter file has the names that
transformers' model has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from softgrpo.config.sections import LoraConfig
from softgrpo.learner.sharding import full
from softgrpo_engine.model.decoder import Decoder

ADAPTER = "default"  # peft's name for the only adapter of a model


def add_adapters(decoder: Decoder, config: LoraConfig, seed: int) -> None:
    """Freezes the weights and puts float32 adapters on the target modules, in place.

    The model is unchanged at first: B is 0, A is drawn from the seed.
    """
    import peft

    wanted = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(config.target_modules),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    decoder.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(wanted, decoder, ADAPTER)
    for parameter in decoder.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@torch.no_grad()
def merged_tensors(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) of every weight with its adapter added, whole, one at a time.

    Without adapters, simply every parameter. With several processes all must take all of them.
    """
    for name, parameter in decoder.named_parameters():
        owner, _, kind = name.rpartition(".")
        if ".lora_" in name:
            continue
        tensor = full(parameter.detach())
        if owner.endswith(".base_layer"):
            owner = owner.removesuffix(".base_layer")
            if kind == "weight":
                layer: Any = decoder.get_submodule(owner)  # peft's LoraLayer
                a, b = (full(part[ADAPTER].weight) for part in (layer.lora_A, layer.lora_B))
                tensor = tensor.float() + (b @ a) * layer.scaling[ADAPTER]
        yield f"{owner}.{kind}", tensor
