"""softgrpo-train --plan: what a configuration needs, by arithmetic, before any GPU is paid for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import AutoConfig, LlamaConfig, Qwen2Config

from softgrpo.config import Config, ConfigError
from softgrpo.learner.device import check_device
from softgrpo_engine.model.config import DecoderConfig
from softgrpo_engine.model.decoder import Decoder
from softgrpo_engine.model.source import resolve_model

GIB = 2**30
GPUS = (1, 8, 64)
GPUS_OF_A_NODE = 8


@dataclass(frozen=True)
class Hardware:
    """One GPU, at the rates that are reached rather than those of its data sheet.

    memory: bytes. training, decoding: bf16 FLOP/s of a training pass and of decode steps.
    bandwidth: of its memory, links: of a GPU to the others, bytes/s.
    """

    name: str = "H100 80 GB"
    memory: float = 80e9
    training: float = 0.4 * 989e12
    decoding: float = 0.6 * 989e12
    bandwidth: float = 0.75 * 3.35e12
    links: float = 0.5 * 450e9


# The paper's models, so that their recipes can be planned without a network.
_QWEN = {"vocab_size": 151936, "num_hidden_layers": 28, "tie_word_embeddings": False}
_SHAPES: dict[str, Any] = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": Qwen2Config(
        **_QWEN, hidden_size=1536, intermediate_size=8960, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=131072,
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": Qwen2Config(
        **(_QWEN | {"vocab_size": 152064}), hidden_size=3584, intermediate_size=18944,
        num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=131072,
    ),
    "meta-llama/Llama-3.2-3B-Instruct": LlamaConfig(
        vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
        num_attention_heads=24, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        max_position_embeddings=131072,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Numbers of parameters: of everything, of a layer, of what no layer holds."""

    config: DecoderConfig
    parameters: int
    layer: int

    @staticmethod
    def of(config: DecoderConfig) -> Shape:
        with torch.device("meta"):
            decoder = Decoder(config)
        count = sum(p.numel() for p in decoder.parameters())
        return Shape(config, count, sum(p.numel() for p in decoder.model.layers[0].parameters()))

    @property
    def root(self) -> int:
        return self.parameters - self.config.num_layers * self.layer

    @property
    def kv_bytes(self) -> int:
        """Of one token, in bfloat16."""
        return 4 * self.config.num_layers * self.config.num_kv_heads * self.config.head_dim

    @property
    def activation_bytes(self) -> int:
        """What a layer keeps of one token for its backward pass, in bfloat16 with float32 norms."""
        c = self.config
        attention = 6 * c.head_dim * (c.num_heads + c.num_kv_heads) + 4 * c.head_dim
        return 16 * c.hidden_size + attention + 8 * c.intermediate_size


def decoder_config(path: str) -> DecoderConfig:
    """Of a local directory, an alias, one of the paper's models, or a model on the hub."""
    if Path(path).is_dir() or "/" not in path:
        return DecoderConfig.from_pretrained(resolve_model(path))
    if path in _SHAPES:
        return DecoderConfig.from_hf(_SHAPES[path], ())
    try:
        return DecoderConfig.from_hf(AutoConfig.from_pretrained(path))
    except OSError as error:
        raise ConfigError(f"model.path: no config.json of {path!r}: {error}") from None


def memory(config: Config, shape: Shape, gpus: int) -> dict[str, float]:
    """Bytes on each GPU, part by part, without the KV cache."""
    shards = min(gpus, GPUS_OF_A_NODE)
    tokens, layers = config.optim.tokens_per_microbatch, shape.config.num_layers
    kept = layers * shape.activation_bytes
    if config.optim.gradient_checkpointing:
        kept = layers * 4 * shape.config.hidden_size + shape.activation_bytes
    kept += 6 * shape.config.hidden_size  # the last norm
    has_first_model = config.algorithm.kl_coef > 0
    parts = {
        "weights, float32": 4 * shape.parameters / shards,
        "gradients, float32": 4 * shape.parameters / shards,
        "Adam, two moments in float32": 8 * shape.parameters / shards,
        "activations of a pass": float(tokens * kept),
        "weights of the engine, bfloat16": 2.0 * shape.parameters,
    }
    if has_first_model:
        parts["first model, for the KL"] = 2 * shape.parameters / shards
    if gpus == 1:
        parts["copies of the weights in bfloat16"] = 2.0 * shape.parameters
    else:
        # Two layers are there at a time; embeddings and head stay, the policy's with a gradient.
        models = 1 + has_first_model
        parts["gathered by FSDP"] = models * (4.0 * shape.layer + 4.0 * shape.root) + 4 * shape.root
    return parts


def kv_cache(config: Config, shape: Shape, gpus: int) -> float:
    """Bytes on each GPU for all samples that are decoded at a time, at full length."""
    share = ceil(config.rollout.prompts_per_step / gpus) * config.rollout.group_size
    length = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    return float(min(config.rollout.max_batch_size, share) * length * shape.kv_bytes)


def training_flops(config: Config, shape: Shape, tokens: float, context: float) -> float:
    """Of the passes over so many tokens that attend to `context` others on average.

    The head is not in it: a position needs the products of its few candidates.
    """
    c = shape.config
    forward = (
        2.0 * c.num_layers * shape.layer + 4.0 * c.num_layers * c.num_heads * c.head_dim * context
    )
    passes = 3 + config.optim.gradient_checkpointing + (config.algorithm.kl_coef > 0)
    return tokens * passes * forward


def seconds(
    config: Config, shape: Shape, gpus: int, hardware: Hardware, cache: float
) -> dict[str, float]:
    """Of a step, part by part, where every response has the full length. cache: bytes for KV."""
    rollout, shards = config.rollout, min(gpus, GPUS_OF_A_NODE)
    samples = rollout.prompts_per_step * rollout.group_size / gpus
    prompts = rollout.prompts_per_step / gpus * config.data.max_prompt_tokens
    length = config.data.max_prompt_tokens + rollout.max_new_tokens
    products = 2.0 * (
        shape.parameters - shape.root + shape.config.vocab_size * shape.config.hidden_size
    )
    at_a_time = max(1.0, min(samples, rollout.max_batch_size, cache // (length * shape.kv_bytes)))
    context = config.data.max_prompt_tokens + rollout.max_new_tokens / 2
    decode_step = max(
        (products + at_a_time * context * shape.kv_bytes) / hardware.bandwidth,
        at_a_time * products / hardware.decoding,
    )
    decoding = ceil(samples / at_a_time) * rollout.max_new_tokens * decode_step
    tokens = prompts + samples * rollout.max_new_tokens
    microbatches = ceil(tokens / config.optim.tokens_per_microbatch)
    traffic = microbatches * 8.0 * shape.parameters * (shards - 1) / shards
    return {
        "rollout": prompts * products / hardware.training + decoding,
        "training passes": training_flops(config, shape, tokens, context) / hardware.training,
        "FSDP traffic, if nothing hid it": traffic / hardware.links,
        "sync": 4.0 * shape.parameters / (hardware.links if gpus > 1 else hardware.bandwidth),
    }


def plan(config: Config, hardware: Hardware | None = None) -> Table:
    """The table for 1, 8 and 64 GPUs (eight to a node)."""
    check_device(config, "cuda")
    hardware = hardware or Hardware()
    if config.lora.rank or config.optim.name != "adamw":
        raise ConfigError("--plan knows AdamW on all weights: optim.name=adamw and lora.rank=0")
    shape = Shape.of(decoder_config(config.model.path))
    table = Table(
        title=f"{config.run.name}: {config.model.path}, {shape.parameters / 1e9:.2f} B parameters",
        caption=f"{hardware.name}, {hardware.training / 1e12:.0f} TFLOP/s in training, "
        f"{hardware.bandwidth / 1e12:.1f} TB/s of memory and {hardware.links / 1e9:.0f} GB/s of "
        "links reached; every response of full length. FSDP within a node of "
        f"{GPUS_OF_A_NODE}, replicas over nodes.",
    )
    table.add_column("on each GPU")
    counts = [gpus for gpus in GPUS if gpus <= config.rollout.prompts_per_step]
    for gpus in counts:
        table.add_column(f"{gpus} GPU{'s' * (gpus > 1)}", justify="right")
    parts = [memory(config, shape, gpus) for gpus in counts]
    left = [hardware.memory - sum(part.values()) for part in parts]
    wanted = [kv_cache(config, shape, gpus) for gpus in counts]
    caches = [max(0.0, min(both)) for both in zip(wanted, left, strict=True)]
    _add(table, parts, GIB, "GiB")
    table.add_row("KV cache: all samples at full length", *_numbers(wanted, GIB))
    fits = [f"{c / GIB:.1f}" if c else "[red]it does not fit[/red]" for c in caches]
    table.add_row("[bold]rollout.kv_memory, GiB[/bold]", *fits)
    table.add_section()
    each = zip(counts, caches, strict=True)
    times = [seconds(config, shape, n, hardware, cache) if cache else {} for n, cache in each]
    _add(table, times, 1.0, "s a step")
    days = [sum(time.values()) * config.run.max_steps / 86400 or None for time in times]
    table.add_row(f"days for {config.run.max_steps} steps", *_numbers(days, 1.0))
    return table


def _add(table: Table, columns: list[dict[str, float]], unit: float, name: str) -> None:
    """A row for each part, and one for their sum."""
    for part in dict.fromkeys(part for column in columns for part in column):
        table.add_row(part, *_numbers([column.get(part) for column in columns], unit))
    sums = _numbers([sum(column.values()) or None for column in columns], unit)
    table.add_row(f"[bold]{name}[/bold]", *(f"[bold]{text}[/bold]" for text in sums))


def _numbers(values: Sequence[float | None], unit: float) -> list[str]:
    return [
        "" if value is None else f"{value / unit:,.1f}" if value > unit else f"{value / unit:.2g}"
        for value in values
    ]
