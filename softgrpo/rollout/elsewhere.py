"""What a process has for an engine while its GPU is part of another process's engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from softgrpo_engine import Output


class EngineElsewhere:
    """A `RolloutEngine` that takes no prompts: with `rollout.tensor_parallel` the first process of
    a group draws on the GPUs of all. It takes part in updates, whose weights are gathered from all
    processes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.weight_version = tokenizer, 0
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def check_fits(self, prompts: Any, params: Any) -> None:
        """The engine itself does."""

    def iter_groups(
        self, groups: Iterable[Any], *settings: Any, **keys: Any
    ) -> Iterator[tuple[int, Output]]:
        """Nothing; the queue of prompts is not asked."""
        return iter(())

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Reads all of them."""
        for _ in named_tensors:
            pass
        self.weight_version = version

    def sleep(self, weights: bool) -> None:
        """There is nothing to free."""

    def wake(self) -> None:
        """Nor to take."""
