"""Loading and calling reward functions, and the process that does it for the runner."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import math
import os
import threading
import traceback
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Rewards = Sequence[float | None]
RewardFunc = Callable[..., Rewards | Awaitable[Rewards]]

EXTRACT = -1  # in place of a function's index: the normalised answers, which can hang as well


class RewardError(ValueError):
    """A reward function that cannot be loaded or called; one line with its name and the cause."""


@dataclass(frozen=True)
class RewardCall:
    """The arguments of one call; a plain object that crosses to a worker.

    completion_ids: the tokens of each completion. columns: for every column of the data one value a
    completion.
    """

    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.completions)

    def part(self, start: int, end: int) -> RewardCall:
        """The call with the samples [start, end) alone."""
        columns = {name: values[start:end] for name, values in self.columns.items()}
        return RewardCall(
            self.prompts[start:end],
            self.completions[start:end],
            self.completion_ids[start:end],
            columns,
        )

    def run(self, function: RewardFunc) -> Any:
        """What the function returns; one that is async is awaited."""
        result = function(
            **{
                **self.columns,
                "prompts": self.prompts,
                "completions": self.completions,
                "completion_ids": self.completion_ids,
            }
        )
        if not inspect.isawaitable(result):
            return result

        async def awaited() -> Any:
            return await result

        # In a thread of its own: a notebook already runs an event loop in this one.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, awaited()).result()


def load_function(path: str) -> RewardFunc:
    """The function at `package.module.function` or `file.py:function`."""
    file, colon, name = path.rpartition(":")
    try:
        if colon:
            module = _load_file(Path(file), path)
        else:
            module_name, _, name = path.rpartition(".")
            if not module_name:
                raise RewardError(
                    f"reward function {path!r}: give package.module.function or file.py:function"
                )
            module = importlib.import_module(module_name)
    except RewardError:
        raise
    except Exception as error:  # whatever the user's module does when it is imported
        raise RewardError(f"cannot import reward function {path!r}: {_one_line(error)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise RewardError(f"reward function {path!r}: there is no function {name!r}")
    return function


def call_function(function: RewardFunc, name: str, call: RewardCall) -> list[float | None]:
    """Calls a reward function and checks what it returns: one finite number or None a sample."""
    try:
        result = call.run(function)
    except Exception as error:
        sample = _failing_sample(function, call)
        raise RewardError(f"reward function {name!r} raised {_describe(error)}{sample}") from error
    try:
        rewards = [None if value is None else float(value) for value in result]
    except (TypeError, ValueError):
        raise RewardError(
            f"reward function {name!r} must return a list of numbers or None, got {result!r:.80}"
        ) from None
    if len(rewards) != len(call):
        raise RewardError(
            f"reward function {name!r} returned {len(rewards)} rewards for {len(call)} completions"
        )
    for index, reward in enumerate(rewards):
        if reward is not None and not math.isfinite(reward):
            raise RewardError(
                f"reward function {name!r} returned {reward} for completion "
                f"{call.completions[index]!r:.80}"
            )
    return rewards


def serve(descriptor: int) -> None:
    """The worker: receives function paths, then (index, RewardCall), and answers each.

    Answers are lists of rewards (of normalised answers for EXTRACT) or a RewardError. Ends when the
    runner closes the connection, and also, while a function hangs, when the runner is gone: its end
    of our standard input closes.
    """
    threading.Thread(target=_exit_with_runner, daemon=True).start()
    with suppress(OSError):  # Linux: an answer that eats all memory ends this process, not the run
        Path("/proc/self/oom_score_adj").write_text("1000")
    from softgrpo.rewards.math import extract_answer

    connection = Connection(descriptor)
    functions: list[tuple[str, RewardFunc]] = []
    # A runner that was killed is an end of file, or a reset where it had not read an answer.
    with suppress(EOFError, ConnectionError):
        paths = connection.recv()
        try:
            functions = [(function_name(path), load_function(path)) for path in paths]
            connection.send(None)
        except RewardError as error:
            connection.send(error)
        while True:
            index, call = connection.recv()
            if index == EXTRACT:
                connection.send([extract_answer(text) for text in call.completions])
                continue
            name, function = functions[index]
            try:
                connection.send(call_function(function, name, call))
            except RewardError as error:
                connection.send(RewardError(str(error)))


def function_name(path: str) -> str:
    """The name under which a function's rewards are logged."""
    return path.rpartition(":")[2].rpartition(".")[2]


def _load_file(file: Path, path: str) -> Any:
    if not file.is_file():
        raise RewardError(f"reward function {path!r}: no such file: {file}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise RewardError(f"reward function {path!r}: {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _failing_sample(function: RewardFunc, call: RewardCall) -> str:
    """Names the first sample that fails alone; nothing when only the whole batch does."""
    for index in range(len(call)):
        try:
            call.part(index, index + 1).run(function)
        except Exception:
            return f", on completion {call.completions[index]!r:.80}"
    return ""


def _describe(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(frame.filename).name}:{frame.lineno}"
    return f"{type(error).__name__}: {_one_line(error)} ({where})"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _exit_with_runner() -> None:
    # Not by sys.stdin: whoever waits in its lock while the interpreter ends makes it abort.
    while os.read(0, 1024):
        pass
    os._exit(0)
