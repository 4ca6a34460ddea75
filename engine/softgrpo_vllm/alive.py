"""What vLLM's processes may do instead of answering, in one line each."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

from vllm.v1.engine.exceptions import EngineDeadError


class EngineLost(RuntimeError):
    """vLLM's process has died, or never began; one line that says what to do."""


@contextmanager
def starting() -> Iterator[None]:
    """Raises ValueError, one line, for what does not go with soft thinking, out of the many lines
    in which vLLM reports it; EngineLost where its process ended instead."""
    try:
        yield
    except ValueError as error:
        if (ours := re.search(r"softgrpo: .*?(?= \[type=|$)", str(error), re.MULTILINE)) is None:
            raise
        raise ValueError(ours[0]) from error
    except RuntimeError as error:
        if "core initialization failed" not in str(error):
            raise
        raise EngineLost("vLLM did not start: what it printed above says why") from error


@contextmanager
def asking() -> Iterator[None]:
    """Raises EngineLost where vLLM's process has died."""
    try:
        yield
    except EngineDeadError as error:
        raise EngineLost(
            "vLLM's process has died: see what it printed; with run.resume=auto a run goes on from "
            "its last checkpoint"
        ) from error


def watch(client: Any) -> None:
    """Ends the waiting for an engine that has died.

    vLLM 0.32's client notes a killed process, but whoever waits for its next step, or for the
    answer to a call, waits without end. client: that of an `LLMEngine`; one in this process cannot
    die alone.
    """
    if not hasattr(client, "outputs_queue"):
        return
    resources, outputs, calls = client.resources, client.outputs_queue, client.utility_results

    def tell() -> None:
        while not resources.engine_dead:
            time.sleep(0.5)
        outputs.put(EngineDeadError())
        for call in list(calls.values()):
            if not call.done():
                call.set_exception(EngineDeadError())

    Thread(target=tell, name="softgrpo-vllm-watch", daemon=True).start()
