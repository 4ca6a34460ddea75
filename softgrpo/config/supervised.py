"""The configuration of supervised training: what `softgrpo-sft` reads.

The line `key: meaning` of a docstring is the documentation of that key (softgrpo.config.table).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from softgrpo.config.checks import check_name, check_optim
from softgrpo.config.config import ConfigFile
from softgrpo.config.ranges import Positive, Size
from softgrpo.config.schema import ConfigError
from softgrpo.config.sections import AdamWConfig, CheckpointConfig, FewShot, ModelConfig, RunConfig


@dataclass(frozen=True)
class SupervisedRunConfig(RunConfig):
    """Where a run goes and how long it is.

    seed: of the order of the data and of first weights
    """


@dataclass(frozen=True)
class SupervisedModelConfig(ModelConfig):
    """What is trained.

    from_scratch: begin with random weights; of `path`, config.json and the tokenizer are read
    """

    from_scratch: bool = False


@dataclass(frozen=True)
class SupervisedDataConfig:
    """What it is trained on.

    train: a jsonl, json or parquet file, or a hub id
    batch_size: rows of a step
    max_tokens: longest row, prompt and target
    system_prompt: put before every `prompt`
    few_shot: worked examples `{prompt, answer}`, put before every `prompt`
    shuffle: a new order in every epoch, drawn from `run.seed`
    """

    train: str = ""
    batch_size: Size = 32
    max_tokens: Size = 1024
    system_prompt: str | None = None
    few_shot: list[FewShot] = field(default_factory=list)
    shuffle: bool = True


@dataclass(frozen=True)
class SupervisedOptimConfig(AdamWConfig):
    """AdamW, and how a step is cut into passes."""

    lr: Positive = 1e-5


@dataclass(frozen=True)
class SupervisedConfig(ConfigFile):
    """A whole run of supervised training."""

    run: SupervisedRunConfig = field(default_factory=SupervisedRunConfig)
    model: SupervisedModelConfig = field(default_factory=SupervisedModelConfig)
    data: SupervisedDataConfig = field(default_factory=SupervisedDataConfig)
    optim: SupervisedOptimConfig = field(default_factory=SupervisedOptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        check_name(self.run.name)
        if not self.data.train:
            raise ConfigError("data.train is not set: name a dataset, such as train.jsonl")
        check_optim(self.optim)
