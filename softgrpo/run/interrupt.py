"""SIGTERM and Ctrl-C while a run is going on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run that was asked to end, and did so with everything saved; one line that says where."""

    def __init__(self, number: int, step: int, steps: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"{name}: saved after step {step} of {steps}; run.resume=auto continues")
        self.signal = number


class StopRequest:
    """signal: the number of the signal that asked the run to end, None while none did."""

    signal: int | None = None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Inside, the first SIGTERM or Ctrl-C is noted, with a line; the second one acts at once.

    Outside of the main thread signals cannot be caught: they stay as they are. So does one that
    the process was started to ignore, as a shell does for Ctrl-C when it starts a background job.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {n: h for n in _SIGNALS if (h := signal.getsignal(n)) is not signal.SIG_IGN}

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = number
        _restore(before)
        name = signal.Signals(number).name
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\n{name}: saving after this step; again: ending at once\n".encode())

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        _restore(before)


def _restore(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
