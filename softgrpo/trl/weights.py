"""The weights of the model that TRL trains, as an engine takes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from softgrpo_engine.model.config import DecoderConfig

# Beside LoRA on linear layers, what changes a layer otherwise than by adding to its weight.
_NOT_ADDED = ("use_dora", "modules_to_save", "bias", "trainable_token_indices", "target_parameters")


def check_trainable(model: Any) -> None:
    """Raises ValueError, one line, for an architecture that our engine has none of, and for a model
    whose weights no engine reads: quantized ones, and adapters other than plain LoRA on linear
    layers."""
    # Whoever draws: logits that others cap or scale would be scored without that.
    DecoderConfig.from_hf(base_model(model).config)
    quantized = [n for n, p in model.named_parameters() if not p.dtype.is_floating_point]
    if quantized:
        raise ValueError(
            f"{quantized[0]} is quantized, which no engine here reads: load it in bfloat16"
        )
    if model.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"the model is {model.dtype}: load it in bfloat16 or float32")
    for config in getattr(model, "peft_config", {}).values():
        kind = str(config.peft_type).rpartition(".")[2]
        other = [
            name
            for name in _NOT_ADDED
            if getattr(config, name, None) not in (None, False, "none", [])
        ]
        if kind != "LORA" or other:
            raise ValueError(
                f"peft: {' '.join([kind, *other[:1]])} is not served here: give a LoraConfig "
                "without it, whose target_modules are linear layers of the blocks"
            )
    if type(model.get_input_embeddings()) is not nn.Embedding:
        raise ValueError(
            "peft: the input embeddings have an adapter, which mixtures of them would leave out: "
            "take them out of target_modules"
        )


def base_model(model: Any) -> Any:
    """The model of transformers itself, under its adapters."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


@torch.no_grad()
def merged_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) of every parameter, adapters added, one at a time; the model
    itself stays as it is."""
    base = base_model(model)
    for name, parameter in base.named_parameters():
        owner, _, kind = name.rpartition(".")
        if ".lora_" in name:
            continue
        tensor = parameter.detach()
        if owner.endswith(".base_layer"):
            owner = owner.removesuffix(".base_layer")
            layer: Any = base.get_submodule(owner)
            if kind == "weight":
                for adapter in layer.active_adapters:
                    tensor = tensor.float() + layer.get_delta_weight(adapter)
        yield f"{owner}.{kind}", tensor
        del tensor  # not held while the next one is made
