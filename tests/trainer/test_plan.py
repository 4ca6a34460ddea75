"""The arithmetic of --plan against what a small run really takes."""

import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config

from softgrpo.config import Config, ConfigError
from softgrpo.tools.plan import (
    Shape,
    decoder_config,
    kv_cache,
    memory,
    plan,
    seconds,
    training_flops,
)
from softgrpo_engine.execution.memory import page_bytes
from softgrpo_engine.model.config import DecoderConfig
from softgrpo_engine.model.decoder import Decoder
from softgrpo_engine.scheduling.kv_cache import PAGE_SIZE
from softgrpo_engine.training.group_attention import GroupAttention

PROMPT, RESPONSES = 128, 7
TOKENS = PROMPT * (1 + RESPONSES)
SMALL = DecoderConfig.from_hf(
    Qwen2Config(
        vocab_size=300,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    (),
)


def config_of(**sections):
    base = Config.load("demo")
    changes = {
        name: SimpleNamespace(**{**vars(getattr(base, name)), **values})
        for name, values in sections.items()
    }
    return SimpleNamespace(**{**vars(base), **changes})


def a_pass(decoder):
    """Input and arguments of one training pass of TOKENS tokens."""
    inputs_TH = torch.randn(TOKENS, SMALL.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    response = torch.arange(PROMPT, 2 * PROMPT)
    positions = torch.cat([torch.arange(PROMPT), response.repeat(RESPONSES)])
    heads = (SMALL.num_heads, SMALL.num_kv_heads)
    return inputs_TH, positions, GroupAttention([PROMPT], [[PROMPT] * RESPONSES], *heads)


def test_weights_gradients_and_moments_are_exact():
    decoder = Decoder(SMALL)
    optimizer = torch.optim.AdamW(decoder.parameters())
    for parameter in decoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    parts = memory(config_of(), Shape.of(SMALL), 1)
    weights = sum(p.nbytes for p in decoder.parameters())
    moments = sum(
        state[key].nbytes for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")
    )
    assert parts["weights, float32"] == parts["gradients, float32"] == weights
    assert parts["Adam, two moments in float32"] == moments
    assert parts["weights of the engine, bfloat16"] == weights / 2
    # A node of eight holds the whole once, and so does every further node.
    for gpus in (8, 64):
        assert memory(config_of(), Shape.of(SMALL), gpus)["weights, float32"] == weights / 8


def test_the_cache_is_that_of_the_engine():
    config = config_of(
        rollout={"max_new_tokens": 1000, "max_batch_size": 32}, data={"max_prompt_tokens": 24}
    )
    pages = 32 * 1024 // PAGE_SIZE
    assert kv_cache(config, Shape.of(SMALL), 1) == pages * page_bytes(Decoder(SMALL).bfloat16())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_that_a_pass_keeps(checkpointing):
    decoder = Decoder(SMALL).train()
    decoder.gradient_checkpointing = checkpointing
    weights = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        of_tokens = tensor.dim() and tensor.shape[0] == TOKENS
        if of_tokens and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    inputs_TH, positions, attention = a_pass(decoder)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = decoder(inputs_TH, positions, attention)
    measured = sum(storage.nbytes() for storage in kept.values())
    config = config_of(
        optim={"tokens_per_microbatch": TOKENS, "gradient_checkpointing": checkpointing}
    )
    planned = memory(config, Shape.of(SMALL), 1)["activations of a pass"]
    if checkpointing:  # and the layer that is computed again, which is not alive yet
        planned -= TOKENS * Shape.of(SMALL).activation_bytes
    assert measured == pytest.approx(planned, rel=0.15)
    assert out.requires_grad


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_are_those_of_a_pass(checkpointing):
    decoder = Decoder(SMALL).train()
    decoder.gradient_checkpointing = checkpointing
    with FlopCounterMode(display=False) as counter:
        decoder(*a_pass(decoder)).sum().backward()
    config = config_of(optim={"gradient_checkpointing": checkpointing}, algorithm={"kl_coef": 0.0})
    # The counter does not know the attention of the CPU.
    planned = training_flops(config, Shape.of(SMALL), TOKENS, context=0.0)
    assert counter.get_total_flops() == pytest.approx(planned, rel=0.1)


def test_the_recipes_of_the_paper_are_planned_without_a_network():
    sizes = {"paper-1.5b": 1.78, "paper-3b": 3.21, "paper-7b": 7.62}
    for recipe, billions in sizes.items():
        config = Config.load(recipe)
        shape = Shape.of(decoder_config(config.model.path))
        assert shape.parameters / 1e9 == pytest.approx(billions, abs=0.01)
        console = Console(record=True, width=120, file=io.StringIO())
        console.print(plan(config))
        text = console.export_text()
        assert "64 GPUs" in text
        assert "rollout.kv_memory, GiB" in text


@pytest.mark.parametrize("override", ["lora.rank=8", "optim.name=adamw_8bit"])
def test_what_the_arithmetic_does_not_know_is_refused(override):
    with pytest.raises(ConfigError, match="--plan knows AdamW on all weights"):
        plan(Config.load("paper-1.5b", [override]))


def test_more_gpus_take_less_time_and_a_smaller_cache_more():
    from softgrpo.tools.plan import Hardware

    config = Config.load("paper-1.5b")
    shape = Shape.of(decoder_config(config.model.path))
    one, eight = (sum(seconds(config, shape, n, Hardware(), 20e9).values()) for n in (1, 8))
    assert 4 < one / eight < 12
    small = seconds(config, shape, 8, Hardware(), 2e9)["rollout"]
    assert small > 2 * seconds(config, shape, 8, Hardware(), 20e9)["rollout"]
