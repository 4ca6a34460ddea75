"""A round of prompts: sampled by all processes together, scored as its groups end."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager

import torch

from softgrpo.data.prompts import Prompt
from softgrpo.distributed import World
from softgrpo.rewards import RewardRunner
from softgrpo.rewards.runner import ByFunction, call_of, columns_of, joined
from softgrpo.rollout.engines import RolloutEngine
from softgrpo.rollout.sampling import Sampling, iter_samples
from softgrpo.rollout.scored import ScoredRollout
from softgrpo_engine import Output


class Stopped(RuntimeError):
    """The samples of a round are not wanted any more."""


class Round:
    """What becomes of prompts: `sample`, `wait`, `gather`, then `scored`.

    A process draws the next prompt when its engine has room for it. Which one draws what changes
    nothing: a sample hangs on its uid, and all processes put the samples in the order of the
    prompts. They make their rounds in the same order; `sample` may run in any thread, as it takes
    part in no collective communication.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        rewards: RewardRunner,
        world: World,
        prompts: list[Prompt],
        uids: Sequence[Sequence[int]],
        sampling: Sampling,
    ) -> None:
        self.rewards, self.world = rewards, world
        self.prompts = prompts
        self.weight_version = engine.weight_version
        self.seconds = 0.0
        self._stopped = threading.Event()
        self._outputs: dict[int, Output] = {}
        self._started: dict[int, Future[ByFunction] | None] = {}
        self._rewards: dict[int, ByFunction] = {}
        self._samples = iter_samples(
            engine,
            [prompt.token_ids for prompt in prompts],
            uids,
            sampling,
            queue=world.queue(len(prompts)),
            at_once=-(-len(prompts) // world.engines),
            between_steps=self._check,
        )

    def sample(self) -> None:
        """Draws this process's part. Rewards of a group are on their way as soon as it has ended,
        and what is wrong with one is raised before the next is drawn."""
        columns, start = columns_of(self.prompts), time.perf_counter()
        with closing(self._samples):
            for index, output in self._samples:
                self._outputs[index] = output
                self._started[index] = self.rewards.start(self.prompts[index], output, columns)
        self.seconds = time.perf_counter() - start

    def stop(self) -> None:
        """Ends `sample`, from another thread: it raises Stopped."""
        self._stopped.set()

    def wait(self) -> None:
        """Until the rewards are there."""
        self._rewards = {i: part.result() for i, part in self._started.items() if part}

    def gather(self) -> None:
        """Brings together what all processes have."""
        for outputs, rewards in self.world.gather((self._outputs, self._rewards)):
            self._outputs |= outputs
            self._rewards |= rewards

    def scored(self) -> ScoredRollout:
        """All samples with their rewards, in the order of the prompts."""
        prompts, indices = self.prompts, range(len(self.prompts))
        outputs = [self._outputs[index] for index in indices]
        rewards = [self._rewards[index] for index in indices if index in self._rewards]
        if not rewards:  # of callables: each process scores its share, as one call
            mine = self.world.share(indices)
            shared = [prompts[i] for i in mine], [outputs[i] for i in mine]
            call = call_of(*shared, columns_of(prompts))
            rewards = self.world.gather(self.rewards.rewards(call))
        total_S, by_function = self.rewards.total(joined(rewards), outputs)
        versions = [self.weight_version] * len(outputs)
        return ScoredRollout(prompts, outputs, total_S, by_function, versions, self.seconds)

    def _check(self) -> None:
        """Between two steps of the engine."""
        if self._stopped.is_set():
            raise Stopped
        for part in self._started.values():
            if part and part.done():
                part.result()


@contextmanager
def sampled_beside(drawn: Round, device: torch.device) -> Iterator[Future[None]]:
    """Samples in a thread while the caller does something else. Both are over at the end: after an
    error of the caller the samples are given up.

    device: the engine's. On a GPU the thread has a stream of its own, so that decode steps fill
    what the caller leaves idle.
    """
    num_threads = torch.get_num_threads()
    stream = _stream_beside(device) if device.type == "cuda" else None

    def sample() -> None:
        torch.set_num_threads(num_threads)  # a new thread has the default number
        if stream is None:
            drawn.sample()
            return
        torch.cuda.set_device(stream.device)
        with torch.cuda.stream(stream):
            drawn.sample()

    if stream is not None:  # the weights are there
        stream.wait_stream(torch.cuda.current_stream(device))
    with ThreadPoolExecutor(1, "softgrpo-rollout") as thread:
        sampling = thread.submit(sample)
        try:
            yield sampling
            sampling.result()
        except BaseException:
            drawn.stop()
            raise
    if stream is not None:
        torch.cuda.current_stream(device).wait_stream(stream)


@functools.cache
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    """The same at every step: freed memory is kept for the stream that it was taken on."""
    return torch.cuda.Stream(device)
