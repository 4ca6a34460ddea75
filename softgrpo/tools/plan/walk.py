"""A training run of one process on the fake GPU: what it holds in each phase of a step.

The run's own functions are called in the order in which `softgrpo.trainer` calls them. Passes are
alike, so an update has two of the largest: the second finds the gradient of the first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PretrainedConfig

from softgrpo.config import Config
from softgrpo.distributed import World
from softgrpo.learner.load import load_policies
from softgrpo.learner.lora import merged_tensors
from softgrpo.learner.optimizer import make_optimizer
from softgrpo.learner.passes import Passes
from softgrpo.learner.policy import Policy
from softgrpo.learner.update import Update
from softgrpo.rollout.batch import RolloutBatch
from softgrpo.rollout.engines import make_engine, sleeps
from softgrpo.rollout.sampling import sampling_params, soft_params
from softgrpo.tools.plan.device import DEVICE, FakeGPU
from softgrpo.tools.plan.model import write_empty_model
from softgrpo_engine import LLM, SoftTokens
from softgrpo_engine.execution.decode_inputs import DecodeInputs, DecodeShape
from softgrpo_engine.scheduling.sequence import pages_for

GPUS_OF_A_NODE = 8
START, ROLLOUT, OLD, REFERENCE, UPDATE, SYNC = PHASES = (
    "start", "rollout", "old densities", "reference", "update", "sync",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Share:
    """What a process has of a step at full length, and the passes that stand for its update.

    samples: of a step; prompt, response: their tokens; group_size: samples of a prompt.
    minibatches: updates of a step. Each of two passes is as large as one can be: samples_of_pass
    of response_of_pass tokens behind one prompt.
    """

    samples: int
    prompt: int
    response: int
    group_size: int
    minibatches: int
    samples_of_pass: int
    response_of_pass: int

    @staticmethod
    def of(config: Config, gpus: int) -> Share:
        rollout, optim = config.rollout, config.optim
        samples = ceil(rollout.prompts_per_step / gpus) * rollout.group_size
        prompt, response = config.data.max_prompt_tokens, rollout.max_new_tokens
        room = max(1, optim.tokens_per_microbatch - prompt)
        together = min(samples, ceil(room / response))
        size = optim.minibatch_prompts or rollout.prompts_per_step
        return Share(
            samples=samples,
            prompt=prompt,
            response=response,
            group_size=rollout.group_size,
            minibatches=ceil(rollout.prompts_per_step / size),
            samples_of_pass=together,
            response_of_pass=min(response, room // together),
        )

    @property
    def tokens(self) -> int:
        """Of a step, in passes of whole samples with their prompts."""
        per_pass = self.prompt + self.samples_of_pass * self.response_of_pass
        together = max(1, (per_pass - self.prompt) // self.response)
        return self.samples * self.response + ceil(self.samples / together) * self.prompt

    @property
    def walked_tokens(self) -> int:
        """Of the two passes."""
        return 2 * (self.prompt + self.samples_of_pass * self.response_of_pass)


def walk(gpu: FakeGPU, config: Config, model: PretrainedConfig, layers: int, gpus: int) -> None:
    """What the first of so many GPUs does, with so many layers of the model."""
    share = Share.of(config, gpus)
    config = _with_layers(config, layers / model.num_hidden_layers)
    if config.lora.rank:
        importlib.import_module("peft")  # which looks for CUDA's functions meanwhile
    world = World(0, gpus, ceil(gpus / GPUS_OF_A_NODE))
    with TemporaryDirectory() as name, _processes(gpus), gpu:
        folder = Path(name)
        write_empty_model(model, layers, folder)
        gpu.enter_place(START, "engine")
        length = share.prompt + share.response
        llm: Any = make_engine(config, folder, _Tokenizer(), length, share.samples)
        gpu.enter_place(START, "policies")
        policy, reference = load_policies(config, folder, DEVICE, world)
        optimizer = make_optimizer(policy.decoder, config.optim)
        _take_empty_step(optimizer, gpu)
        _follow(gpu, policy, optimizer)
        if sleeps(config, llm.device):
            llm.sleep(weights=config.rollout.sleep == "always")
        batch, first = _batch(config, share), _followed(gpu, reference)
        # Its share is all that there is: the others have as much.
        samples = range(2 * share.samples_of_pass)
        if share.minibatches > 1:
            Passes(policy, first, batch, config, World()).densities(samples)
        gpu.enter_place(UPDATE)
        update = Update(policy, first, optimizer, World())
        update(batch, torch.ones(len(samples)), 1e-6, config)
        optimizer.zero_grad()
        gpu.enter_place(SYNC, "weights")
        llm.update_weights(merged_tensors(policy.decoder), version=1)
        gpu.enter_place(SYNC, "cache")
        if sleeps(config, llm.device):
            llm.wake()
        _sample(gpu, llm, config, share)  # of the next step, as all but the first of a run


class _Tokenizer:
    """All that the engine asks of one."""

    def decode(self, *_: Any, **__: Any) -> str:
        return ""


def _with_layers(config: Config, part: float) -> Config:
    """The configuration for a part of the layers and one update."""
    rollout, optim = config.rollout, config.optim
    kv_memory = None if rollout.kv_memory is None else rollout.kv_memory * part
    # Which token ends the thinking is the tokenizer's to say, and none is needed.
    soft = dataclasses.replace(rollout.soft, end_of_thinking=None)
    return dataclasses.replace(
        config,
        rollout=dataclasses.replace(rollout, kv_memory=kv_memory, soft=soft),
        optim=dataclasses.replace(optim, minibatch_prompts=None),
    )


@contextlib.contextmanager
def _processes(count: int) -> Iterator[None]:
    """PyTorch's process group of which there is one, and which sends nothing."""
    if count == 1:
        yield
        return
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # DTensor remembers groups of processes, which are gone


def _take_empty_step(optimizer: torch.optim.Optimizer, gpu: FakeGPU) -> None:
    """Its moments are there from the first step on."""
    gpu.enter_place("")
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _follow(gpu: FakeGPU, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Tells the GPU where the passes are."""

    def begin(*_: Any) -> None:
        if gpu.place[0] != REFERENCE:
            gpu.enter_place(UPDATE if torch.is_grad_enabled() else OLD)

    policy.register_forward_pre_hook(begin)
    layers = policy.decoder.model.layers
    for index, layer in enumerate(layers):
        _follow_layer(gpu, layer, layer_name(index, len(layers)))
    at_head = lambda *_: gpu.enter_place(gpu.place[0], "head")  # noqa: E731
    policy.decoder.model.norm.register_forward_pre_hook(at_head)
    optimizer.register_step_pre_hook(lambda *_: gpu.enter_place(UPDATE, "optimizer"))


def _follow_layer(gpu: FakeGPU, layer: nn.Module, name: str) -> None:
    def before(*_: Any) -> None:
        if "backward" not in gpu.place[1]:  # there it is computed again
            gpu.enter_place(gpu.place[0], f"forward {name}")

    def after(module: nn.Module, args: Any, out: tuple[Tensor, Tensor]) -> None:
        if out[0].requires_grad:
            out[0].register_hook(lambda _: gpu.enter_place(UPDATE, f"backward {name}"))

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)


def layer_name(index: int, layers: int) -> str:
    """The same in models of any depth, for the two layers at each end."""
    if index < 2:
        return str(index)
    return str(index - layers) if index >= layers - 2 else "between"


def _followed(gpu: FakeGPU, reference: Any) -> Any:
    """The first policy, which tells the GPU when it is asked."""
    if reference is None:
        return None

    class Followed:
        def __call__(self, batch: RolloutBatch) -> Any:
            before = gpu.place
            gpu.enter_place(REFERENCE)
            out = reference(batch)
            gpu.enter_place(*before)
            return out

    return Followed()


def _sample(gpu: FakeGPU, llm: LLM, config: Config, share: Share) -> None:
    """The largest prefill and decode step."""
    gpu.enter_place(ROLLOUT, "prefill")
    rollout = config.rollout
    soft = soft_params(rollout, config.algorithm.objective)
    params = dataclasses.replace(sampling_params(rollout), n=share.group_size)
    call = llm.submit([[0] * share.prompt], params, soft or False)
    llm.runner.run(llm.scheduler.schedule())
    llm.release(call)
    rows = min(llm.runner.max_batch_size, share.samples)
    shape = DecodeShape(rows, pages_for(share.prompt + share.response), 0)
    words = torch.zeros(shape.words, dtype=torch.int32, device=DEVICE)
    gpu.enter_place(ROLLOUT, "decode")
    with torch.inference_mode():
        llm.runner._decode(DecodeInputs.views(words, shape))


def _batch(config: Config, share: Share) -> RolloutBatch:
    """What was sampled: thoughts, where the recipe has them, else tokens."""
    samples = 2 * share.samples_of_pass
    tokens = samples * share.response_of_pass
    soft = config.rollout.soft
    slots = max(soft.top_k if soft.enabled else 1, config.rollout.top_k)
    return RolloutBatch(
        prompt_ids=torch.zeros(2 * share.prompt, dtype=torch.int32),
        prompt_lens=torch.full((2,), share.prompt, dtype=torch.int32),
        group=torch.arange(2, dtype=torch.int32).repeat_interleave(share.samples_of_pass),
        response_lens=torch.full((samples,), share.response_of_pass, dtype=torch.int32),
        soft=SoftTokens(
            ids=torch.zeros(tokens, slots, dtype=torch.int32),
            gprime=torch.zeros(tokens, slots),
            kind=torch.full((tokens,), int(soft.enabled), dtype=torch.uint8),
            forced=torch.zeros(tokens, dtype=torch.bool),
            token=torch.zeros(tokens, dtype=torch.int32),
        ),
        logprobs=torch.zeros(tokens),
        uid=torch.arange(samples),
        finish=torch.zeros(samples, dtype=torch.uint8),
        seed=0,
        stream=0,
        weight_version=torch.zeros(samples, dtype=torch.int64),
    )
