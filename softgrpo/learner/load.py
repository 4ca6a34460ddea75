"""The policies of a run, made from a model's directory."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from softgrpo.config import Config
from softgrpo.distributed import World
from softgrpo.learner.lora import add_adapters
from softgrpo.learner.policy import Policy
from softgrpo.learner.sharding import shard
from softgrpo.rollout.sampling import density_settings
from softgrpo_engine.model.weights import load_decoder


def load_policies(
    config: Config, model_path: Path, device: torch.device, world: World
) -> tuple[Policy, Policy | None]:
    """The trainable policy with float32 master weights, and the frozen first one where there is a
    KL to it. With adapters these are float32, and the frozen weights have the dtype of the
    computation."""
    settings = density_settings(config)
    dtype = getattr(torch, config.model.dtype)
    decoder = load_decoder(model_path, dtype if config.lora.rank else torch.float32, device)
    decoder.gradient_checkpointing = config.optim.gradient_checkpointing
    reference = None
    if config.algorithm.kl_coef > 0:
        frozen = copy.deepcopy(decoder).to(dtype).requires_grad_(False)
        reference = Policy(frozen, settings, dtype)
        shard(reference, frozen.model.layers, dtype, world)
    if config.lora.rank:
        add_adapters(decoder, config.lora, config.run.seed)
    policy = Policy(decoder, settings, dtype)
    # With adapters the frozen weights are in that dtype already, and the adapters stay float32.
    shard(policy, decoder.model.layers, None if config.lora.rank else dtype, world)
    return policy, reference
