"""The configuration of a run: dataclasses <- YAML recipe <- dotted overrides, checked strictly."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from softgrpo.schema import ConfigError, Range, build, did_you_mean

__all__ = ["Config", "ConfigError"]

Count = Annotated[int, Range(0)]
Size = Annotated[int, Range(1)]
Seed = Annotated[int, Range(0, 2**64 - 1)]
NonNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, open_low=True)]
Fraction = Annotated[float, Range(0, 1, open_low=True)]


@dataclass(frozen=True)
class RunConfig:
    """The folder of the run is `<output_dir>/<name>`; resume is none, auto or a checkpoint path."""

    name: str = "run"
    output_dir: str = "runs"
    seed: Seed = 0
    max_steps: Size = 100
    resume: str = "none"


@dataclass(frozen=True)
class ModelConfig:
    """path: a local directory, a hub id, or the alias smollm2-135m."""

    path: str = "smollm2-135m"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


@dataclass(frozen=True)
class FewShot:
    """One worked example, put before the question as a user turn and an assistant turn."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class DataConfig:
    """train and eval: `reasoning_gym:NAME?key=value&...`, a jsonl/json/parquet file, or a hub id.

    prompt_template replaces the text of the prompt; `{column}` stands for a column of the item
    other than its answer (of a reasoning_gym item: `question` and the keys of its metadata).
    """

    train: str = ""
    eval: str | None = None
    prompt_key: str = "prompt"
    answer_key: str = "answer"
    prompt_template: str | None = None
    max_prompt_tokens: Size = 1024
    system_prompt: str | None = None
    few_shot: list[FewShot] = field(default_factory=list)
    shuffle: bool = True
    eval_size: Size = 64


@dataclass(frozen=True)
class SoftConfig:
    """Soft positions of a rollout. end_of_thinking: auto, a token, its id, or null for none."""

    enabled: bool = True
    top_k: Annotated[int, Range(1, 64)] = 5
    top_p: Fraction = 0.95
    temperature: Positive = 1.0
    tau: Positive = 0.1
    noise: Literal["gumbel", "none"] = "gumbel"
    noise_scale: Positive = 1.0
    noise_clip: tuple[float, float] | None = None
    end_of_thinking: int | str | None = "auto"
    max_soft_tokens: Size | None = None


@dataclass(frozen=True)
class RolloutConfig:
    """temperature, top_p, top_k: discrete positions. kv_memory: GiB, null = automatic."""

    engine: Literal["native"] = "native"
    prompts_per_step: Size = 8
    group_size: Annotated[int, Range(2)] = 8
    max_new_tokens: Size = 32
    temperature: Positive = 1.0
    top_p: Fraction = 0.95
    top_k: Annotated[int, Range(-1)] = 5
    max_batch_size: Size = 256
    max_batch_tokens: Size = 8192
    kv_memory: Positive | None = None
    soft: SoftConfig = field(default_factory=SoftConfig)


@dataclass(frozen=True)
class RewardFunction:
    """path: `package.module.function` or `file.py:function`."""

    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class RewardConfig:
    """timeout_s: seconds that one sample may take. require_eos: a cut response earns nothing."""

    functions: list[RewardFunction] = field(
        default_factory=lambda: [RewardFunction("softgrpo.rewards.math_reward")]
    )
    timeout_s: Positive = 10.0
    workers: Size = 1
    require_eos: bool = True


@dataclass(frozen=True)
class AlgorithmConfig:
    """Names and formulas: softgrpo.density, softgrpo.advantages, softgrpo.loss."""

    objective: Literal["exact", "official", "concrete"] = "exact"
    discrete_logprob: Literal["auto", "candidates", "full"] = "auto"
    advantage: Literal["grpo", "dr_grpo", "loo"] = "grpo"
    loss_aggregation: Literal["token", "sequence", "constant"] = "token"
    clip_low: Annotated[float, Range(0, 1)] = 0.2
    clip_high: NonNegative = 0.2
    dual_clip: Annotated[float, Range(1, open_low=True)] | None = 3.0
    kl_coef: NonNegative = 0.0


@dataclass(frozen=True)
class OptimConfig:
    """minibatch_prompts: prompts of one update, null = all of the step."""

    lr: Positive = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Count = 0
    betas: tuple[NonNegative, NonNegative] = (0.9, 0.999)
    weight_decay: NonNegative = 0.01
    grad_clip: Positive = 1.0
    minibatch_prompts: Size | None = None
    tokens_per_microbatch: Size = 4096


@dataclass(frozen=True)
class CheckpointConfig:
    """every: steps between two checkpoints, 0 = only the last step. keep: how many stay."""

    every: Count = 10
    keep: Size = 2
    export_hf: bool = True


@dataclass(frozen=True)
class EvalConfig:
    """every: steps between two evaluations, 0 = never. k: the k of pass@k, each <= samples."""

    every: Count = 0
    before_train: bool = True
    after_train: bool = True
    samples: Size = 8
    k: list[Size] = field(default_factory=lambda: [1, 8])
    seed: Seed = 1


@dataclass(frozen=True)
class LogConfig:
    """Every samples_every steps (0 = never) samples_per_step samples are shown and kept."""

    samples_every: Count = 5
    samples_per_step: Count = 2


@dataclass(frozen=True)
class Config:
    """A whole run: `Config.load` reads one, `to_yaml` writes it."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Config:
        """Reads a packaged recipe (a bare name such as `demo`) or a YAML file.

        overrides: `section.key=value`, the value in YAML: `optim.lr=1e-6`, `eval.k=[1, 4]`.
        Raises ConfigError, one line, before anything is loaded.
        """
        values = _parse_yaml(_read(path), str(path)) or {}
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected sections such as 'run:' and 'optim:'")
        for override in overrides:
            _apply(values, override)
        config: Config = build(cls, values)
        return config

    def to_yaml(self) -> str:
        """The resolved configuration; `Config.load` reads it back to an equal one."""
        text: str = yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)
        return text

    def __post_init__(self) -> None:
        if not self.data.train:
            raise ConfigError(
                "data.train is not set: name a dataset, such as reasoning_gym:chain_sum, "
                "train.jsonl or openai/gsm8k"
            )
        if not self.reward.functions:
            raise ConfigError("reward.functions is empty: name at least one reward function")
        if self.rollout.soft.enabled:
            self._check_soft()
        if max(self.optim.betas) >= 1:
            raise ConfigError(f"optim.betas: {list(self.optim.betas)} is not allowed: must be < 1")
        if not self.eval.k or max(self.eval.k) > self.eval.samples:
            raise ConfigError(
                f"eval.k: {self.eval.k} is not allowed: each k must be <= eval.samples "
                f"({self.eval.samples})"
            )
        if self.eval.every and self.data.eval is None:
            raise ConfigError("eval.every is set, but data.eval names no dataset")

    def _check_soft(self) -> None:
        soft, objective = self.rollout.soft, self.algorithm.objective
        if soft.noise == "none":
            raise ConfigError(
                "rollout.soft.noise: 'none' cannot be trained, its samples have no density; "
                "use gumbel, or rollout.soft.enabled=false for discrete rollouts"
            )
        if soft.noise_clip is not None and objective == "official":
            raise ConfigError(
                "rollout.soft.noise_clip: leave it null: algorithm.objective 'official' sets the "
                "clip [-1.5, 3] itself"
            )
        if soft.noise_clip is not None:
            raise ConfigError(
                f"rollout.soft.noise_clip: leave it null: algorithm.objective {objective!r} is "
                "the density of unclipped noise (the released models used 'official')"
            )


def recipe_names() -> list[str]:
    """The packaged recipes that `Config.load` knows by name."""
    folder = importlib.resources.files("softgrpo") / "recipes"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name[0] not in "._")


def _read(path: str | Path) -> str:
    name = str(path)
    if Path(name).suffix or Path(name).name != name:
        try:
            return Path(name).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read config file {name!r}: {error.strerror}") from None
    if name not in recipe_names():
        hint = did_you_mean(name, recipe_names())
        raise ConfigError(f"no packaged recipe {name!r}{hint}")
    return (importlib.resources.files("softgrpo") / "recipes" / f"{name}.yaml").read_text("utf-8")


def _parse_yaml(text: str, where: str) -> Any:
    try:
        document = yaml.load(text, Loader=yaml.BaseLoader)  # every scalar stays text: see schema
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    return "" if document is None else document


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    *sections, name = key.split(".")
    for section in sections:
        inner = values.get(section)
        if not isinstance(inner, dict):
            inner = values[section] = {}
        values = inner
    values[name] = _parse_yaml(text, f"override {override!r}")
