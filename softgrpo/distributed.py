"""The processes of a run: one by itself, or those that torchrun started.

Every process has the whole configuration, an engine of its own, and a shard of the weights. Work is
shared out here and its results are gathered, so that all processes then take the same decisions
from the same numbers. With one process every function is the identity.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from softgrpo.config import ConfigError

T = TypeVar("T")


class LostProcess(RuntimeError):
    """Another process of the run died or hangs; one line that says what to do."""


@dataclass(frozen=True)
class World:
    """rank: this process, of `size`. nodes: machines, which have equally many processes.
    tensor_parallel: processes in order whose GPUs one engine has, that of the first of them."""

    rank: int = 0
    size: int = 1
    nodes: int = 1
    tensor_parallel: int = 1
    _queues: Iterator[int] = field(default_factory=itertools.count, compare=False, repr=False)

    @staticmethod
    def join(timeout_s: float, tensor_parallel: int = 1) -> World:
        """Meets the other processes that torchrun started, if it started this one.

        timeout_s: after which a process that waits for another gives up. A GPU is chosen by local
        rank; the back end is nccl with GPUs and gloo without. Raises ConfigError where an engine's
        GPUs would be on two machines.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if (local := int(os.environ.get("LOCAL_WORLD_SIZE", size))) % tensor_parallel:
            raise ConfigError(
                f"rollout.tensor_parallel={tensor_parallel} does not divide the {local} processes "
                "of a machine: set it to a divisor, or start as many by torchrun --nproc-per-node"
            )
        if size == 1:
            return World()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if not dist.is_initialized():
            backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        return World(dist.get_rank(), size, size // local, tensor_parallel)

    def leave(self) -> None:
        """Parts from the others at the end of a run."""
        if self.size > 1:
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """Whether this process writes, prints and logs."""
        return self.rank == 0

    @property
    def engines(self) -> int:
        """How many draw samples."""
        return self.size // self.tensor_parallel

    @property
    def has_engine(self) -> bool:
        """Whether this process's does; else its GPU is that of an earlier process's engine."""
        return self.rank % self.tensor_parallel == 0

    def check_shares(self, name: str, count: int) -> None:
        """Raises ConfigError unless there is work for everyone."""
        if count < self.size:
            raise ConfigError(
                f"{name}={count} is fewer than the {self.size} processes: raise it, or start fewer"
            )

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part: consecutive, of equal sizes but for one item."""
        count = len(items)
        return list(items[self.rank * count // self.size : (self.rank + 1) * count // self.size])

    def queue(self, count: int) -> Iterator[int]:
        """The numbers below `count` in order, each for the engine that is the first to ask.

        All processes make the same queues in the same order; any thread may read one, of those
        that have an engine.
        """
        if self.size == 1:
            return iter(range(count))
        key, store = f"softgrpo/queue/{next(self._queues)}", _get_default_store()

        def numbers() -> Iterator[int]:
            while (number := store.add(key, 1) - 1) < count:
                yield number
            if number == count + self.engines - 1:  # the last to hear that there are no more
                store.delete_key(key)

        return numbers()

    def gather(self, value: T) -> list[T]:
        """The value of every process, in the order of ranks, on every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place. tensor: on this process's device or its CPU."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """Until all processes are here."""
        self.gather(None)


@contextmanager
def patience() -> Iterator[None]:
    """Turns what the communication library says of a lost process into one line."""
    try:
        yield
    except RuntimeError as error:
        if not dist.is_initialized() or not _is_of_communication(error):
            raise
        # Without the place in the library's source that it begins with.
        reason = " ".join(re.sub(r"^\[\S+\]", "", str(error)).split())[:120]
        raise LostProcess(
            f"process {dist.get_rank()} lost contact with another one ({reason}); see what that "
            "one printed last; run.resume=auto continues from the last checkpoint"
        ) from error


def _is_of_communication(error: RuntimeError) -> bool:
    # What gloo raises has no type of its own, but begins with the place in its source.
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)
