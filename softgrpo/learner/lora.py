"""Low-rank adapters (LoRA, arXiv 2106.09685) of `peft` on the decoder.

`peft` wraps the decoder's q_proj ... down_proj where they stand: in training each is a linear layer
of its own with its Hugging Face name, only the engine's copy fuses them. So nothing has to be
split: the engine receives the merged weights, and the adapter file has the names that
transformers' model has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from softgrpo.config.sections import LoraConfig
from softgrpo.learner.policy import Policy
from softgrpo.learner.scoring import PositionLogProbs
from softgrpo.learner.sharding import full
from softgrpo.rollout.batch import RolloutBatch
from softgrpo_engine.model.decoder import Decoder

ADAPTER = "default"  # peft's name for the only adapter of a model


def add_adapters(decoder: Decoder, config: LoraConfig, seed: int) -> None:
    """Freezes the weights and puts float32 adapters on the target modules, in place.

    The model is unchanged at first: B is 0, A is drawn from the seed. They have values at once (on
    the CPU) also where the weights have no memory yet: no file holds them.
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
        peft.inject_adapter_in_model(wanted, decoder, ADAPTER)
    device = "cpu" if decoder.embed_weight.is_meta else decoder.embed_weight.device
    generator = torch.Generator().manual_seed(seed)
    for name, layer in decoder.named_modules():
        if name.endswith((f".lora_A.{ADAPTER}", f".lora_B.{ADAPTER}")):
            weight = torch.zeros(layer.get_parameter("weight").shape)
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(weight, math.sqrt(5), generator=generator)  # as peft does
            layer.weight = nn.Parameter(weight.to(device))


def model_weights(decoder: Decoder) -> dict[str, Tensor]:
    """The parameters of the model itself by their Hugging Face names; without adapters, all."""
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in decoder.named_parameters()
        if ".lora_" not in name
    }


class WithoutAdapters:
    """The model that a policy with adapters began as: the policy itself with its adapters off, so
    that it takes no memory. It is frozen: it is called without autograd alone."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def __call__(self, batch: RolloutBatch) -> PositionLogProbs:
        assert not torch.is_grad_enabled()
        layers: Any = [m for m in self.policy.modules() if hasattr(m, "disable_adapters")]
        # Not by `enable_adapters`: it freezes the parameters too, which FSDP looks at once only.
        for layer in layers:
            layer._disable_adapters = True
        try:
            return self.policy(batch)
        finally:
            for layer in layers:
                layer._disable_adapters = False


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
        del tensor  # not held while the next one is gathered
