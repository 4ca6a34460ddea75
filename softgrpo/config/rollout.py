"""The sections of the configuration that say how samples are drawn."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal

from softgrpo.config.ranges import Count, Fraction, Positive, Size
from softgrpo.config.schema import Range


@dataclass(frozen=True)
class SoftConfig:
    """Soft positions of a rollout.

    enabled: false: discrete rollouts, the objective is then ordinary GRPO
    top_k: candidates of a position
    top_p: the nucleus among them
    temperature: of the logits
    tau: temperature of the Gumbel-Softmax; small means nearly one token
    weight_floor: a weight below so much of the largest is 0; 0: none
    noise: the method: `gumbel`, `dirichlet`, `gaussian`, `multiplex`, `multiplex_weighted`,
        `mixture_of_inputs`, `mean`, `embedding`; `none` has no density to train with
    noise_scale: factor of Gumbel noise, concentration of Dirichlet, sigma of Gaussian noise, draws
        of Multiplex, beta of Mixture of Inputs; of `embedding`, the noise's standard deviation in
        units of the root mean square of the embedding table
    noise_clip: bounds of the noise; the objective `official` sets its own
    end_of_thinking: `auto` (`</think>` where the tokenizer has it), a token, its id, or null
    max_soft_tokens: budget, after which the end of thinking is forced
    min_soft_tokens: positions before which neither thinking nor the response may end; equal to
        the budget, thinking has exactly so many positions
    """

    enabled: bool = True
    top_k: Annotated[int, Range(1, 64)] = 5
    top_p: Fraction = 0.95
    temperature: Positive = 1.0
    tau: Positive = 0.1
    weight_floor: Annotated[float, Range(0, 1)] = 0.0
    noise: str = "gumbel"
    noise_scale: Positive = 1.0
    noise_clip: tuple[float, float] | None = None
    end_of_thinking: int | str | None = "auto"
    max_soft_tokens: Size | None = None
    min_soft_tokens: Count = 0

    @property
    def mixture(self) -> tuple[float, float]:
        """What `soft_weights` makes the weights of."""
        return self.tau, self.weight_floor


@dataclass(frozen=True)
class ScheduleConfig:
    """Soft settings that go linearly to those of `rollout.soft` over the first steps.

    steps: at which they are reached; 0: no schedule
    tau: at step 1; null: not scheduled
    temperature: at step 1
    noise_scale: at step 1
    weight_floor: at step 1
    """

    steps: Count = 0
    tau: Positive | None = None
    temperature: Positive | None = None
    noise_scale: Positive | None = None
    weight_floor: Annotated[float, Range(0, 1)] | None = None

    @property
    def starts(self) -> dict[str, float]:
        """The values at step 1 of what is scheduled; nothing without steps."""
        values = asdict(self)
        steps = values.pop("steps")
        return {name: value for name, value in values.items() if steps and value is not None}


@dataclass(frozen=True)
class FillerConfig:
    """Copies of one token in the place of thoughts: the control of what thoughts are worth.

    They are no choice of the policy, so they end the prompt; `rollout.soft.end_of_thinking` follows
    them where the tokenizer has it.

    count: how many; 0: none
    token: a text that is one token, or its id
    """

    count: Count = 0
    token: int | str = "."


@dataclass(frozen=True)
class RolloutConfig:
    """How many samples a step draws, and how.

    engine: `native`, `vllm` (docs/vllm.md), `hf` (transformers: slow, for comparison) or the name
        of an installed one
    prompts_per_step: prompts of a step
    group_size: samples of a prompt
    max_new_tokens: longest response
    temperature: of discrete positions
    top_p: of discrete positions
    top_k: of discrete positions; 0 or -1: the whole vocabulary
    max_batch_size: samples decoded at a time
    max_batch_tokens: tokens of one forward pass over prompts
    kv_memory: GiB of the KV cache; null: what the fullest batch needs at full length
    tensor_parallel: GPUs of one engine, of as many processes of a machine (engine `vllm`)
    sleep: the engine's memory during the update. `auto`: the KV cache is given back on a GPU;
        `always`: it and the weights are, on any device; `never`: all stays
    ahead: 1: the samples of the next step are drawn during the update, with the weights before it;
        needs `algorithm.correction`
    """

    engine: str = "native"
    prompts_per_step: Size = 8
    group_size: Annotated[int, Range(2)] = 8
    max_new_tokens: Size = 32
    temperature: Positive = 1.0
    top_p: Fraction = 0.95
    top_k: Annotated[int, Range(-1)] = 5
    max_batch_size: Size = 256
    max_batch_tokens: Size = 8192
    kv_memory: Positive | None = None
    tensor_parallel: Size = 1
    sleep: Literal["auto", "always", "never"] = "auto"
    ahead: Annotated[int, Range(0, 1)] = 0
    soft: SoftConfig = field(default_factory=SoftConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    filler_thoughts: FillerConfig = field(default_factory=FillerConfig)
