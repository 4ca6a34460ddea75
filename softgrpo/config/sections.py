"""The configuration of a run: dataclasses <- YAML recipe <- dotted overrides, checked strictly.

The line `key: meaning` of a docstring is the documentation of that key (softgrpo.config.table).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from softgrpo.config.ranges import Count, Fraction, NonNegative, Positive, Seed, Size
from softgrpo.config.rollout import RolloutConfig
from softgrpo.config.schema import Range


@dataclass(frozen=True)
class RunConfig:
    """Where a run goes and how long it is.

    name: the folder of the run is `<output_dir>/<name>`
    output_dir: where the folders of runs are
    seed: of the noise and the order of the data
    deterministic: on a GPU: sums in one order, so that a run gives the same bits again; attention's
        backward pass is slower. On a CPU this is so in any case
    max_steps: training steps
    resume: `none`, `auto` (the newest checkpoint, if there is one) or the path of a checkpoint from
        which a new run begins
    """

    name: str = "run"
    output_dir: str = "runs"
    seed: Seed = 0
    deterministic: bool = False
    max_steps: Size = 100
    resume: str = "none"


@dataclass(frozen=True)
class DistributedRunConfig(RunConfig):
    """Where a run goes and how long it is.

    timeout_s: after which a process that waits for another one gives up
    """

    timeout_s: Positive = 600.0


@dataclass(frozen=True)
class ModelConfig:
    """What is trained.

    path: a local directory, a hub id, or the alias `smollm2-135m`
    dtype: of the computation; the master weights are float32
    """

    path: str = "smollm2-135m"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


Linear = Literal[
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
]  # fmt: skip


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (peft) that are trained instead of the weights.

    rank: of an adapter; 0: none, all weights are trained
    alpha: the adapters are scaled by alpha / rank
    target_modules: the linear layers that have one
    """

    rank: Count = 0
    alpha: Positive = 32.0
    target_modules: list[Linear] = field(default_factory=lambda: list(get_args(Linear)))


@dataclass(frozen=True)
class FewShot:
    """One worked example, put before the question as a user turn and an assistant turn."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class DataConfig:
    """What it is trained on.

    train: `reasoning_gym:NAME?key=value&...`, a jsonl, json or parquet file, or a hub id
    eval: the held-out questions, named likewise
    prompt_key: column of the prompt: text or chat messages
    answer_key: column of the answer; null where the data has none (verl's layout is recognised)
    prompt_template: text that replaces the prompt; `{column}` is a column other than the answer
    max_prompt_tokens: longest prompt
    drop_long_prompts: leave longer training prompts out, instead of refusing to start
    system_prompt: put before every prompt
    few_shot: worked examples `{prompt, answer}`, put before every prompt
    shuffle: a new order in every epoch, drawn from `run.seed`
    eval_size: at most so many held-out questions are used
    """

    train: str = ""
    eval: str | None = None
    prompt_key: str = "prompt"
    answer_key: str | None = "answer"
    prompt_template: str | None = None
    max_prompt_tokens: Size = 1024
    drop_long_prompts: bool = False
    system_prompt: str | None = None
    few_shot: list[FewShot] = field(default_factory=list)
    shuffle: bool = True
    eval_size: Size = 64


@dataclass(frozen=True)
class RewardFunction:
    """path: `package.module.function` or `file.py:function`."""

    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class RewardConfig:
    """What a response earns.

    functions: list of `{path, weight}`; a path is `package.module.function` or `file.py:function`
    timeout_s: seconds that one sample may take
    workers: processes that run the functions
    require_eos: a response that the length limit cut earns nothing
    """

    functions: list[RewardFunction] = field(
        default_factory=lambda: [RewardFunction("softgrpo.rewards.math_reward")]
    )
    timeout_s: Positive = 10.0
    workers: Size = 1
    require_eos: bool = True


@dataclass(frozen=True)
class CorrectionConfig:
    """Importance weights for the difference between engine and trainer.

    mode: `truncate`: weight min(ratio, max); `mask`: weight 0 outside of [1/max, max]
    level: the ratio of a `token`, or of a `sequence`: the product over its tokens
    max: bound of the ratio trainer / engine
    """

    mode: Literal["none", "truncate", "mask"] = "none"
    level: Literal["token", "sequence"] = "token"
    max: Annotated[float, Range(1, open_low=True)] = 2.0


@dataclass(frozen=True)
class AlgorithmConfig:
    """What is maximised.

    objective: density of a soft position: `exact`, `official`, `concrete`, `censored`, or the
        surrogates `argmax`, `lepo` and `latent_grpo`; of draws `exact`, `slot_mean` or `per_slot`,
        of a drawn token's mixture `token`
    discrete_logprob: a discrete position is scored over its recorded `candidates` or the `full`
        vocabulary; `auto`: its candidates where `rollout.top_k` leaves at most 64
    advantage: `grpo` (R - mean) / std, `dr_grpo` R - mean, `loo` R - mean of the others
    loss_aggregation: mean over `token`s, over samples of means (`sequence`), or sum / `constant`
    ratio_level: a ratio of every `token`, or of every `sequence` (GSPO)
    clip_low: the ratio is clipped at 1 - clip_low
    clip_high: and at 1 + clip_high
    dual_clip: bound of the ratio where the advantage is negative; null: none
    kl_coef: weight of the KL to the frozen first model; 0: none, and no copy of it in memory
    kl_estimator: `k1`, `k2` pull with the gradient of KL(policy || first model), `k3` with that of
        KL(first model || policy); `auto`: k2 where k3 has an infinite variance (`exact`), else k3
    dynamic_sampling_rounds: further rounds of prompts that replace groups of equal rewards (DAPO)
    overlong_buffer: the reward falls by up to 1 over the last so many tokens of the limit (DAPO)
    mask_truncated: responses that the length limit cut are not learnt from
    """

    objective: str = "exact"
    discrete_logprob: Literal["auto", "candidates", "full"] = "auto"
    advantage: Literal["grpo", "dr_grpo", "loo"] = "grpo"
    loss_aggregation: Literal["token", "sequence", "constant"] = "token"
    ratio_level: Literal["token", "sequence"] = "token"
    clip_low: Annotated[float, Range(0, 1)] = 0.2
    clip_high: NonNegative = 0.2
    dual_clip: Annotated[float, Range(1, open_low=True)] | None = 3.0
    kl_coef: NonNegative = 0.0
    kl_estimator: Literal["auto", "k1", "k2", "k3"] = "auto"
    dynamic_sampling_rounds: Count = 0
    overlong_buffer: Count = 0
    mask_truncated: bool = False
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW, and how a step is cut into passes.

    name: `adamw`, or `adamw_8bit` with moments in 8 bits (bitsandbytes; in one process)
    lr: learning rate
    schedule: after the warm-up, down to 0 at `run.max_steps` unless constant
    warmup_steps: steps of linear warm-up
    betas: of AdamW
    weight_decay: of AdamW
    grad_clip: largest norm of the gradient
    tokens_per_microbatch: most tokens of one forward and backward pass, at least one sample's;
        bounds the memory
    gradient_checkpointing: compute a layer again in the backward pass instead of keeping it
    """

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    lr: Positive = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Count = 0
    betas: tuple[NonNegative, NonNegative] = (0.9, 0.999)
    weight_decay: NonNegative = 0.01
    grad_clip: Positive = 1.0
    tokens_per_microbatch: Size = 4096
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class OptimConfig(AdamWConfig):
    """AdamW, and how a step is cut into updates.

    minibatch_prompts: prompts of one update; null: all of the step
    """

    minibatch_prompts: Size | None = None


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a run.

    every: steps between two checkpoints; 0: only the last step
    keep: how many checkpoints stay
    export_hf: write `model/` at the end
    """

    every: Count = 10
    keep: Size = 2
    export_hf: bool = True


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation during training; sampling that is null is that of the rollout.

    every: steps between two evaluations; 0: never
    before_train: one before the first step
    after_train: one after the last
    samples: of a question
    k: the k of pass@k, each at most `samples`
    seed: of its noise, whose stream is not that of training
    temperature: of soft and discrete positions
    top_p: of soft and discrete positions
    top_k: of soft and discrete positions
    tau: of soft positions
    max_new_tokens: longest response
    """

    every: Count = 0
    before_train: bool = True
    after_train: bool = True
    samples: Size = 8
    k: list[Size] = field(default_factory=lambda: [1, 8])
    seed: Seed = 1
    temperature: Positive | None = None
    top_p: Fraction | None = None
    top_k: Annotated[int, Range(1, 64)] | None = None
    tau: Positive | None = None
    max_new_tokens: Size | None = None


@dataclass(frozen=True)
class LogConfig:
    """Samples that are shown in the terminal and kept for the report, and where metrics go.

    samples_every: steps between; 0: never
    samples_per_step: how many
    report_to: list of `tensorboard`, `wandb`, `trackio`, beside metrics.jsonl
    """

    samples_every: Count = 5
    samples_per_step: Count = 2
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)


@dataclass(frozen=True)
class HealthConfig:
    """Warnings in words while a run goes wrong.

    window: steps over which trends are judged; 0: no warnings
    stop: end a run that went wrong, with the best checkpoint as its model
    """

    window: Count = 50
    stop: bool = False


@dataclass(frozen=True)
class Sections:
    """All of them."""

    run: DistributedRunConfig = field(default_factory=DistributedRunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
