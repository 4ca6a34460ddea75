"""What the trainer asks of a rollout engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from softgrpo.config import Config, ConfigError
from softgrpo.config.engines import find_engine

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

    def generate_groups(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        soft: SoftParams | Literal[False] | None = None,
        *,
        seed: int,
        uids: Sequence[Sequence[int]],
        stream: int = 0,
    ) -> list[Output]:
        """Samples prompt i once for each uid of ``uids[i]``; soft False is discrete. Samples have
        their kept_mass where params ask for it."""
        ...

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replaces the weights (Hugging Face names, every parameter once), forgets what was
        computed with the old ones, and sets weight_version."""


def load_engine(name: str) -> Callable[..., RolloutEngine]:
    """The class of the engine. Raises ConfigError when it cannot be imported."""
    point = find_engine(name)
    try:
        engine: Callable[..., RolloutEngine] = point.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"rollout.engine: {name!r} cannot be imported: {error}") from None
    return engine


def make_engine(
    config: Config, model_path: Path, tokenizer: Any, max_model_len: int
) -> RolloutEngine:
    """The engine of a run with the model; max_model_len: the longest prompt with its response.

    No longer than the run needs: the size of the KV cache, and with it the schedule, then does not
    depend on how much memory happens to be free.
    """
    return load_engine(config.rollout.engine)(
        model_path,
        tokenizer=tokenizer,
        dtype=config.model.dtype,
        max_model_len=max_model_len,
        kv_memory=config.rollout.kv_memory,
        max_batch_size=config.rollout.max_batch_size,
        max_batch_tokens=config.rollout.max_batch_tokens,
    )
