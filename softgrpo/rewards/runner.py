"""Runs reward functions in processes that can be killed, so that no answer can hang a run."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from softgrpo.config.sections import RewardConfig
from softgrpo.rewards.worker import (
    EXTRACT,
    RewardCall,
    RewardError,
    RewardFunc,
    call_function,
    function_name,
)

if TYPE_CHECKING:
    from torch import Tensor

    from softgrpo.data.examples import Example
    from softgrpo.data.prompts import Prompt
    from softgrpo_engine import Output, Sample

# A worker imports the functions' modules before it answers; torch on a busy disk takes long.
_START_TIMEOUT_S = 120.0


class RewardRunner:
    """The reward functions of a run.

    Functions named in the configuration run in `reward.workers` processes, each with its share of
    the batch. A call that takes longer than `reward.timeout_s`, or that ends its process, is
    repeated sample by sample: the sample that hangs or crashes alone gets None and counts in
    `lost`, the others keep their rewards. Functions given as callables (they need not be
    importable: closures, lambdas) replace those of the configuration and run in this process,
    without a time limit; weights are theirs, 1 each by default. Async functions are awaited.

    Raises RewardError, one line, for a function that cannot be loaded (in the constructor), that
    raises, or that returns anything but one finite number or None a sample.
    """

    def __init__(
        self,
        config: RewardConfig,
        functions: RewardFunc | Sequence[RewardFunc] | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.config = config
        self.lost = 0
        self.functions = [functions] if callable(functions) else list(functions or [])
        if self.functions:
            self.names = [getattr(f, "__name__", type(f).__name__) for f in self.functions]
            self.weights = [1.0] * len(self.names) if weights is None else list(weights)
            if len(self.weights) != len(self.names):
                raise RewardError(
                    f"{len(self.names)} reward functions have {len(self.weights)} weights; give "
                    "one weight a function"
                )
        elif weights is not None:
            raise RewardError(
                "weights are for reward functions given in Python; those of the configuration have "
                "theirs in reward.functions"
            )
        else:
            self.names = [function_name(function.path) for function in config.functions]
            self.weights = [function.weight for function in config.functions]
        if len(set(self.names)) < len(self.names):
            raise RewardError(f"reward functions need different names, got {', '.join(self.names)}")
        count = 0 if self.functions else config.workers
        paths = [function.path for function in config.functions]
        self._workers = [_Worker(paths) for _ in range(count)]
        self._threads = ThreadPoolExecutor(max_workers=max(1, count))
        for worker in self._workers:
            worker.wait_until_ready()

    def score(
        self, prompts: Sequence[Prompt], outputs: Sequence[Output]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Rewards of all samples, in output order.

        prompts: what was asked, one an output. Returns the weighted sum over the functions
        (float32 [S], `reward.require_eos` applied) and the rewards of each function as it gave
        them (name -> float32 [S]); NaN where there is no reward.
        """
        import torch

        pairs = [(p, s) for p, o in zip(prompts, outputs, strict=True) for s in o.samples]
        call = _call([p.example for p, _ in pairs], [sample for _, sample in pairs])
        by_function = {
            name: torch.tensor([math.nan if r is None else r for r in rewards])
            for name, rewards in self.rewards(call).items()
        }
        weighted = [
            w * rewards for w, rewards in zip(self.weights, by_function.values(), strict=True)
        ]
        stacked = torch.stack(weighted)
        # None says that a function does not apply; a sample without any reward has no sum.
        total = torch.where(stacked.isnan().all(0), math.nan, stacked.nansum(0))
        if self.config.require_eos:
            total = apply_require_eos(total, [sample.finish_reason for _, sample in pairs])
        return total, by_function

    def rewards(self, call: RewardCall) -> dict[str, list[float | None]]:
        """The rewards by function name."""
        if self.functions:
            named = zip(self.names, self.functions, strict=True)
            return {name: call_function(function, name, call) for name, function in named}
        return {name: self._remote(index, call) for index, name in enumerate(self.names)}

    def answers(self, call: RewardCall) -> list[str | None]:
        """`extract_answer` of every completion, for voting; None also where a worker was lost."""
        return self._remote(EXTRACT, call)

    def close(self) -> None:
        """Ends the workers."""
        self._threads.shutdown()
        for worker in self._workers:
            worker.stop()

    def _remote(self, index: int, call: RewardCall) -> list[Any]:
        """One function on one batch, split among the workers."""
        count = len(self._workers)
        bounds = [len(call) * part // count for part in range(count + 1)]
        parts = [call.part(start, end) for start, end in itertools.pairwise(bounds)]
        tasks = self._threads.map(self._ask, self._workers, itertools.repeat(index), parts)
        results = list(tasks)
        self.lost += sum(lost for _, lost in results)
        return [reward for rewards, _ in results for reward in rewards]

    def _ask(self, worker: _Worker, index: int, call: RewardCall) -> tuple[list[Any], int]:
        """The results of a part, and how many samples were lost: whole, else one by one."""
        if not len(call):
            return [], 0
        rewards = worker.ask(index, call, self.config.timeout_s)
        if rewards is not None:
            return rewards, 0
        if len(call) == 1:
            return [None], 1
        alone = [
            worker.ask(index, call.part(i, i + 1), self.config.timeout_s) for i in range(len(call))
        ]
        lost = sum(rewards is None for rewards in alone)
        return [None if rewards is None else rewards[0] for rewards in alone], lost


def apply_require_eos(rewards_S: Tensor, finish_reasons: Sequence[str | None]) -> Tensor:
    """A response that did not end by itself earns nothing: its reward is at most 0.

    rewards_S: float [S]. finish_reasons: "stop", "length" or "abort", one a sample.
    """
    import torch

    ended_S = torch.tensor([reason == "stop" for reason in finish_reasons])
    return torch.where(ended_S, rewards_S, rewards_S.clamp(max=0.0))


class _Worker:
    """One process; replaced by a new one when it hangs or dies."""

    def __init__(self, paths: list[str]) -> None:
        self._paths = paths
        self._start()

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        # A fresh interpreter, not multiprocessing: that imports the caller's __main__ again and
        # starts the training a second time where a script has no main guard. Its own session, so
        # that Ctrl-C reaches the run alone.
        search_path = [folder or os.getcwd() for folder in sys.path] + [os.getcwd()]
        descriptor = theirs.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _WORKER_PROGRAM, str(descriptor)],
            stdin=subprocess.PIPE,
            pass_fds=[descriptor],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(search_path)},
            start_new_session=True,
        )
        theirs.close()
        self._finalizer = weakref.finalize(self, _kill, self._process, self._connection)
        self._connection.send(self._paths)
        self._ready = False

    def wait_until_ready(self) -> None:
        """Waits until the functions are loaded; raises RewardError when they cannot be."""
        if not self._ready:
            self._ready = True
            answered, error = self._answer(_START_TIMEOUT_S)
            if not answered:
                raise RewardError(
                    f"a reward worker did not start; loading {', '.join(self._paths)} crashes or "
                    f"takes more than {_START_TIMEOUT_S:.0f} s"
                )
            if error is not None:
                raise error

    def ask(self, index: int, call: RewardCall, timeout_s: float) -> list[Any] | None:
        """The results; None when the worker did not answer in time or died (and was replaced)."""
        self.wait_until_ready()
        try:
            self._connection.send((index, call))
            answered, answer = self._answer(timeout_s)
        except BrokenPipeError:
            answered, answer = False, None
        if not answered:
            self.stop()
            self._start()
            return None
        if isinstance(answer, RewardError):
            raise answer
        results: list[Any] = answer
        return results

    def stop(self) -> None:
        self._finalizer()

    def _answer(self, timeout_s: float) -> tuple[bool, Any]:
        try:
            if self._connection.poll(timeout_s):
                return True, self._connection.recv()
        except (EOFError, ConnectionResetError):
            pass
        return False, None


_WORKER_PROGRAM = "import sys; from softgrpo.rewards.worker import serve; serve(int(sys.argv[1]))"


def _kill(process: subprocess.Popen[bytes], connection: Connection) -> None:
    process.kill()
    process.wait()
    if process.stdin is not None:
        process.stdin.close()
    connection.close()


def _call(examples: Sequence[Example], samples: Sequence[Sample]) -> RewardCall:
    """The arguments of a call; of chat prompts the completions are messages too, as in TRL."""
    names = {name for example in examples for name in example.columns}
    return RewardCall(
        prompts=[example.prompt for example in examples],
        completions=[
            sample.text
            if isinstance(example.prompt, str)
            else [{"role": "assistant", "content": sample.text}]
            for example, sample in zip(examples, samples, strict=True)
        ],
        completion_ids=[list(sample.token_ids) for sample in samples],
        columns={name: [example.columns.get(name) for example in examples] for name in names},
    )
