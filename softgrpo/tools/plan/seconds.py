"""The time of a step, by arithmetic from what was counted."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch

from softgrpo.config import Config
from softgrpo.tools.plan.walk import (
    GPUS_OF_A_NODE,
    OLD,
    REFERENCE,
    ROLLOUT,
    SYNC,
    UPDATE,
    Share,
)
from softgrpo_engine.model.config import DecoderConfig
from softgrpo_engine.model.decoder import Decoder


@dataclass(frozen=True)
class Hardware:
    """One GPU, at the rates that are reached rather than those of its data sheet.

    memory: bytes; reserved: what CUDA, NCCL and gaps between tensors take of them. training,
    attention, decoding: bf16 FLOP/s of a training pass, of its attention (FlashAttention 2) and of
    decode steps. bandwidth: of its memory, links: of a GPU to the others of its node, bytes/s.
    layer: seconds of a decode step that a layer takes beside its bytes: ten small kernels, and the
    gaps between them. Of the rates, training, attention, bandwidth and layer are what an H200
    reached (docs/gpu.md), the first three as shares of its data sheet's; the others are assumed.
    """

    name: str = "H100 80 GB"
    memory: float = 80e9
    reserved: float = 3e9
    training: float = 0.53 * 989e12
    attention: float = 0.27 * 989e12
    decoding: float = 0.6 * 989e12
    bandwidth: float = 0.88 * 3.35e12
    links: float = 0.5 * 450e9
    layer: float = 49e-6

    @property
    def usable(self) -> float:
        return self.memory - self.reserved


@dataclass(frozen=True)
class Size:
    """Parameters of a model: all, and those that a token is multiplied with."""

    config: DecoderConfig
    parameters: int
    products: int

    @staticmethod
    def of(config: DecoderConfig) -> Size:
        with torch.device("meta"):
            decoder = Decoder(config)
        count = sum(p.numel() for p in decoder.parameters())
        table = 0 if config.tie_word_embeddings else decoder.embed_weight.numel()
        return Size(config, count, count - table)

    @property
    def kv_bytes(self) -> int:
        """Of one token, in bfloat16."""
        return 4 * self.config.num_layers * self.config.num_kv_heads * self.config.head_dim


def attention_flops(size: Size, share: Share, samples: int) -> float:
    """Of a forward pass over so many samples, each token attending to those before it: the prompt
    of a group once."""
    groups = samples / share.group_size
    pairs = groups * share.prompt**2 / 2
    pairs += samples * share.response * (share.prompt + share.response / 2)
    return 4.0 * size.config.num_layers * size.config.num_heads * size.config.head_dim * pairs


def seconds(
    config: Config, size: Size, gpus: int, hardware: Hardware, flops: dict[str, float]
) -> dict[str, float]:
    """Of each phase of a step in which every response has the full length.

    flops: what the walk counted. Passes and the gathering of weights hide each other.
    """
    share, shards = Share.of(config, gpus), min(gpus, GPUS_OF_A_NODE)
    attention = attention_flops(size, share, share.samples)
    passes = ceil(2 * share.tokens / share.walked_tokens)
    gathered = 2.0 * size.parameters * (shards - 1) / shards
    times = {ROLLOUT: _rollout(size, share, hardware, kv_cache(config, size, gpus))}
    # Forward; a backward pass computes each product of attention twice and its scores again.
    weight = {OLD: 1.0, REFERENCE: 1.0, UPDATE: 3.5 + config.optim.gradient_checkpointing}
    traffic = {OLD: gathered, REFERENCE: gathered, UPDATE: 4 * gathered}  # and gradients, float32
    for phase, counted in flops.items():
        if phase in weight:
            work = counted * share.tokens / share.walked_tokens / hardware.training
            work += weight[phase] * attention / hardware.attention
            moved = passes * traffic[phase] / hardware.links
            times[phase] = max(work, moved)
    rate = hardware.links if gpus > 1 else hardware.bandwidth
    return times | {SYNC: 4.0 * size.parameters / rate}


def kv_cache(config: Config, size: Size, gpus: int) -> float:
    """Bytes of KV pages that the engine of a GPU has."""
    share, rollout = Share.of(config, gpus), config.rollout
    rows = min(rollout.max_batch_size, share.samples)
    wanted = float(rows * (share.prompt + share.response) * size.kv_bytes)
    return wanted if rollout.kv_memory is None else min(wanted, rollout.kv_memory * 2**30)


def _rollout(size: Size, share: Share, hardware: Hardware, cache: float) -> float:
    length = share.prompt + share.response
    at_a_time = max(1.0, cache // (length * size.kv_bytes))
    cached = at_a_time * (share.prompt + share.response / 2)
    prompts = share.samples / share.group_size * share.prompt
    prefill = prompts * 2.0 * size.products / hardware.training
    steps = ceil(share.samples / at_a_time) * share.response
    return prefill + steps * decode_step(size, hardware, at_a_time, cached)


def decode_step(size: Size, hardware: Hardware, rows: float, cached: float) -> float:
    """Seconds of a step of so many rows with so many tokens in the cache: weights (in bfloat16) and
    cache are read, or their products are done, whichever takes longer."""
    read = (2.0 * size.products + cached * size.kv_bytes) / hardware.bandwidth
    multiplied = rows * 2.0 * size.products / hardware.decoding
    return size.config.num_layers * hardware.layer + max(read, multiplied)
