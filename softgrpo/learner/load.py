"""The policies of a run, made from a model's directory."""

from __future__ import annotations

from pathlib import Path

import torch

from softgrpo.config import Config
from softgrpo.distributed import World
from softgrpo.learner.lora import WithoutAdapters, add_adapters, model_weights
from softgrpo.learner.policy import Policy
from softgrpo.learner.sharding import part_of, shard
from softgrpo.rollout.sampling import density_settings
from softgrpo_engine.model.config import DecoderConfig
from softgrpo_engine.model.decoder import Decoder
from softgrpo_engine.model.weights import allocate, load_weights, meta_decoder, stored_weights


def load_policies(
    config: Config, model_path: Path, device: torch.device, world: World
) -> tuple[Policy, Policy | WithoutAdapters | None]:
    """The trainable policy with float32 master weights, and the frozen first one, in the dtype of
    the computation, where there is a KL to it. With adapters these are float32, the frozen weights
    have the dtype of the computation, and the first policy is the same without the adapters.

    Each process allocates its shard and reads its part of each weight into it, one after another:
    at no time it holds more than its shards and one tensor.
    """
    settings = density_settings(config)
    dtype = getattr(torch, config.model.dtype)
    shape = DecoderConfig.from_pretrained(model_path)

    def load(decoder: Decoder) -> Policy:
        policy = Policy(decoder, settings, dtype)
        # With adapters the frozen weights are in that dtype already, and the adapters stay float32.
        shard(policy, decoder.model.layers, None if config.lora.rank else dtype, world)
        allocate(policy, device)
        weights = model_weights(decoder)
        parts = ((name, part_of(x, weights.get(name))) for name, x in stored_weights(model_path))
        load_weights(decoder, parts, weights)
        return policy

    decoder = meta_decoder(shape, dtype if config.lora.rank else torch.float32)
    decoder.gradient_checkpointing = config.optim.gradient_checkpointing
    if config.lora.rank:
        add_adapters(decoder, config.lora, config.run.seed)
    policy = load(decoder)
    if config.algorithm.kl_coef == 0:
        return policy, None
    if config.lora.rank:
        return policy, WithoutAdapters(policy)
    return policy, load(meta_decoder(shape, dtype).requires_grad_(False))
