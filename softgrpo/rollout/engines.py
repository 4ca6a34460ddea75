"""What the trainer asks of a rollout engine."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from softgrpo.config import Config, ConfigError
from softgrpo.config.engines import find_engine
from softgrpo.distributed import World
from softgrpo.rollout.elsewhere import EngineElsewhere

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from softgrpo_engine import Output, SamplingParams, SoftParams


class RolloutEngine(Protocol):
    """All that the trainer uses of an engine.

    It is made as `make_engine` does, and draws what `softgrpo_kernels.soft_token` draws: the noise
    is a function of (seed, uid, position, token, stream) alone.
    """

    tokenizer: Any
    device: torch.device
    weight_version: int

    def check_fits(self, prompts: Sequence[list[int]], params: SamplingParams) -> None:
        """Raises ValueError, naming the prompt, unless every prompt and its answer can fit."""

    def iter_groups(
        self,
        groups: Iterable[tuple[list[int], Sequence[int]]],
        params: SamplingParams,
        soft: SoftParams | Literal[False] | None = None,
        *,
        seed: int,
        stream: int = 0,
        between_steps: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[int, Output]]:
        """Samples each prompt of (prompt, uids) once for each uid; soft False is discrete. Yields
        (place in groups, Output) as soon as a group has ended.

        groups is a queue that other engines share: the next one is taken when there is room for it.
        between_steps is called now and then; what it raises ends the samples, and reaches the
        caller. Samples have their kept_mass where params ask for it.
        """
        ...

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replaces the weights (Hugging Face names, every parameter once), forgets what was
        computed with the old ones, and sets weight_version. The engine may sleep."""

    def sleep(self, weights: bool) -> None:
        """Frees what an update does not need: the KV cache, and with ``weights`` these, which then
        come by ``update_weights``."""

    def wake(self) -> None:
        """Takes the KV cache again."""


_METHODS = [name for name in vars(RolloutEngine) if not name.startswith("_")]


def load_engine(name: str) -> Callable[..., RolloutEngine]:
    """The class of the engine. Raises ConfigError when it cannot be imported, or is none."""
    point = find_engine(name)
    try:
        engine: Callable[..., RolloutEngine] = point.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"rollout.engine: {name!r} cannot be imported: {error}") from None
    if missing := [method for method in _METHODS if not hasattr(engine, method)]:
        raise ConfigError(
            f"rollout.engine: {name!r} has no {missing[0]}(): an engine has the methods of "
            "softgrpo.rollout.engines.RolloutEngine"
        )
    return engine


def sleeps(config: Config, device: torch.device) -> bool:
    """Whether the engine sleeps during the update: a function of these alone, as the run is to be
    the same whatever else is in memory. With `rollout.ahead` it works meanwhile."""
    mode = config.rollout.sleep
    on_gpu = device.type == "cuda" and not config.rollout.ahead
    return mode == "always" or (mode == "auto" and on_gpu)


def make_engine(
    config: Config,
    model_path: Path,
    tokenizer: Any,
    max_model_len: int,
    max_samples: int,
    world: World = World(),  # noqa: B008 - frozen
) -> RolloutEngine:
    """The engine of a run with the model; one that draws nothing in a process whose GPU is part of
    another's engine.

    max_model_len: the longest prompt with its response. max_samples: the most that this process
    asks for at a time. The KV cache, and with it the schedule, hangs on these and on the
    configuration, never on how much memory happens to be free. Raises ConfigError for tensor
    parallelism with an engine that has none.
    """
    kv_memory, name = config.rollout.kv_memory, config.rollout.engine
    make, options = load_engine(name), {}
    if world.tensor_parallel > 1:
        if "tensor_parallel" not in inspect.signature(make).parameters:
            raise ConfigError(
                f"rollout.tensor_parallel: the engine {name!r} runs on one GPU: take 'vllm', or "
                "tensor_parallel=1"
            )
        options["tensor_parallel"] = world.tensor_parallel
    if not world.has_engine:
        return EngineElsewhere(tokenizer)
    return make(
        model_path,
        tokenizer=tokenizer,
        dtype=config.model.dtype,
        max_model_len=max_model_len,
        kv_memory=math.inf if kv_memory is None else kv_memory,
        max_batch_size=min(config.rollout.max_batch_size, max_samples),
        max_batch_tokens=config.rollout.max_batch_tokens,
        **options,
    )
