"""Runs reward functions in processes that can be killed, so that no answer can hang a run."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import weakref
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Lock
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

    from softgrpo.data.prompts import Prompt
    from softgrpo_engine import Output

# The rewards of each function, in the order of the samples.
ByFunction = dict[str, list[float | None]]

# A worker imports the functions' modules before it answers; torch on a busy disk takes long.
_START_TIMEOUT_S = 120.0


class RewardRunner:
    """The reward functions of a run.

    Functions named in the configuration run in `reward.workers` processes; a call has the samples
    of one prompt. A call that takes longer than `reward.timeout_s`, or that ends its process, is
    repeated sample by sample: the sample that hangs or crashes alone gets None and counts in
    `lost`, the others keep their rewards. Functions given as callables (they need not be
    importable: closures, lambdas) replace those of the configuration and run in this process,
    without a time limit, on all samples at once; weights are theirs, 1 each by default. Async
    functions are awaited.

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
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._lock = Lock()
        self._threads = ThreadPoolExecutor(max_workers=max(1, count))
        for worker in self._workers:
            worker.wait_until_ready()
            self._idle.put(worker)

    def score(
        self, prompts: Sequence[Prompt], outputs: Sequence[Output]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Rewards of all samples, in output order.

        prompts: what was asked, one an output. Returns the weighted sum over the functions
        (float32 [S], `reward.require_eos` applied) and the rewards of each function as it gave
        them (name -> float32 [S]); NaN where there is no reward.
        """
        columns = columns_of(prompts)
        if self.functions:
            return self.total(self.rewards(call_of(prompts, outputs, columns)), outputs)
        started = [self.start(p, o, columns) for p, o in zip(prompts, outputs, strict=True)]
        return self.total(joined([part.result() for part in started if part]), outputs)

    def start(
        self, prompt: Prompt, output: Output, columns: Collection[str]
    ) -> Future[ByFunction] | None:
        """Scores the samples of one prompt in a worker, while the caller goes on.

        columns: what functions get beside prompts and completions, `columns_of` all prompts. None
        where functions are callables: these see the samples of all prompts at once (`rewards`).
        """
        if self.functions:
            return None
        call = call_of([prompt], [output], columns)

        def rewards() -> ByFunction:
            return {name: self._ask(index, call) for index, name in enumerate(self.names)}

        return self._threads.submit(rewards)

    def total(
        self, rewards: ByFunction, outputs: Sequence[Output]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What `score` returns, of the rewards by function."""
        import torch

        by_function = {
            name: torch.tensor([math.nan if r is None else r for r in values])
            for name, values in rewards.items()
        }
        weighted = [
            w * values for w, values in zip(self.weights, by_function.values(), strict=True)
        ]
        stacked = torch.stack(weighted)
        # None says that a function does not apply; a sample without any reward has no sum.
        total = torch.where(stacked.isnan().all(0), math.nan, stacked.nansum(0))
        if self.config.require_eos:
            reasons = [sample.finish_reason for output in outputs for sample in output.samples]
            total = apply_require_eos(total, reasons)
        return total, by_function

    def rewards(self, call: RewardCall) -> ByFunction:
        """The rewards by function name, of samples that the workers share. Nobody is asked about no
        samples: a process may have no share of few prompts."""
        if not len(call):
            return {name: [] for name in self.names}
        if self.functions:
            named = zip(self.names, self.functions, strict=True)
            return {name: call_function(function, name, call) for name, function in named}
        return {name: self._remote(index, call) for index, name in enumerate(self.names)}

    def answers(self, call: RewardCall) -> list[str | None]:
        """`extract_answer` of every completion, for voting; None also where a worker was lost."""
        return self._remote(EXTRACT, call)

    def close(self) -> None:
        """Ends the workers."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    def _remote(self, index: int, call: RewardCall) -> list[Any]:
        """One function on one batch, split among the workers."""
        count = len(self._workers)
        bounds = [len(call) * part // count for part in range(count + 1)]
        parts = [call.part(start, end) for start, end in itertools.pairwise(bounds)]
        tasks = [self._threads.submit(self._ask, index, part) for part in parts]
        return [result for task in tasks for result in task.result()]

    def _ask(self, index: int, call: RewardCall) -> list[Any]:
        """The results of a worker: of the whole call, else one by one."""
        if not len(call):
            return []
        timeout_s, worker = self.config.timeout_s, self._idle.get()
        try:
            results = worker.ask(index, call, timeout_s)
            if results is not None:
                return results
            samples = [call.part(i, i + 1) for i in range(len(call))]
            alone = [None] if len(call) == 1 else [worker.ask(index, s, timeout_s) for s in samples]
        finally:
            self._idle.put(worker)
        with self._lock:
            self.lost += alone.count(None)
        return [None if results is None else results[0] for results in alone]


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


def columns_of(prompts: Sequence[Prompt]) -> set[str]:
    """The columns that any of the prompts has."""
    return {name for prompt in prompts for name in prompt.example.columns}


def call_of(
    prompts: Sequence[Prompt], outputs: Sequence[Output], columns: Collection[str]
) -> RewardCall:
    """The arguments of a call; of chat prompts the completions are messages too, as in TRL. A
    column that a prompt lacks is None there."""
    pairs = [(p.example, s) for p, o in zip(prompts, outputs, strict=True) for s in o.samples]
    return RewardCall(
        prompts=[example.prompt for example, _ in pairs],
        completions=[
            sample.text
            if isinstance(example.prompt, str)
            else [{"role": "assistant", "content": sample.text}]
            for example, sample in pairs
        ],
        completion_ids=[list(sample.token_ids) for _, sample in pairs],
        columns={name: [example.columns.get(name) for example, _ in pairs] for name in columns},
    )


def joined(parts: Sequence[ByFunction]) -> ByFunction:
    """The rewards of all parts, one after the other."""
    return {name: [reward for part in parts for reward in part[name]] for name in parts[0]}
