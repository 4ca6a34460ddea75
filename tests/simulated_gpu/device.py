"""The device as Python sees it: waits by line, launches by kernel, and when it is visible."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torchgen
from torch import Tensor
from torch._dynamo import trace_rules

ROOT = Path(__file__).parents[2]
PROGRAM = tuple(str(ROOT / name) + "/" for name in ("kernels", "engine", "softgrpo"))

# What the host waits for in a CUDA build: the size of the result, or its value, is on the device.
WAITING = {
    "_local_scalar_dense": "item",
    "_unique": "unique",
    "_unique2": "unique",
    "bincount": "bincount",
    "equal": "equal",
    "histc": "histc",
    "isin": "isin",  # its sorting path
    "masked_select": "masked_select",
    "nonzero": "nonzero",
    "repeat_interleave": "repeat_interleave without output_size",
    "unique_consecutive": "unique",
    "unique_dim": "unique",
}


class Device:
    """The one simulated device of the process.

    core: the C++ side. waits: how often the host waited, by (why, line of the program).
    """

    def __init__(self, core: ModuleType) -> None:
        self.core = core
        # Dynamo's table of torch's functions is made once: of torch.cuda's own, not of ours.
        trace_rules.get_torch_obj_rule_map()
        self.sync_debug_mode = "default"
        self.waits: Counter[tuple[str, str]] = Counter()
        core.configure(_unchecked_operators(), {f"aten::{k}": v for k, v in WAITING.items()},
                       self._on_wait, program_line)  # fmt: skip

    @contextlib.contextmanager
    def visible(self, count: int = 1) -> Iterator[Device]:
        """The program finds ``count`` GPUs, as it would by torch.cuda; afterwards none."""
        from simulated_gpu import torch_cuda, triton_launch

        self.reset()
        self.core.set_device_count(count)
        self.core.set_visible(True)
        try:
            with torch_cuda.patched(self, count), triton_launch.patched(self):
                yield self
        finally:
            self.core.set_visible(False)
            self.reset()

    def reset(self) -> None:
        """Nothing is under way, nothing has been counted."""
        self.core.reset()
        self.core.set_device(0)
        self.waits.clear()
        self.sync_debug_mode = "default"

    def wait(self, why: str) -> None:
        """The host waits for all of the device's work."""
        self.core.wait(why)

    def note(self, why: str) -> None:
        """A wait for less than everything, which the caller does itself."""
        self.waits[why, program_line()] += 1

    @contextlib.contextmanager
    def counting(self) -> Iterator[Counts]:
        """What happens inside: waits and launches."""
        waits, launches = Counter(self.waits), Counter(self.core.launches())
        counts = Counts()
        yield counts
        counts.waits = self.waits - waits
        counts.launches = Counter(self.core.launches()) - launches

    def launch(self, name: str, tensors: list[Tensor], run: Callable[[], Any]) -> None:
        """``run`` is a kernel: it computes on `as_cpu` of these tensors, now and in replays."""
        self.core.launch(name, tensors, run)

    def as_cpu(self, value: Any) -> Any:
        """The same memory as a CPU tensor; what is no tensor as it is."""
        return self.core.as_cpu(value) if isinstance(value, Tensor) else value

    def _on_wait(self, why: str) -> str:
        place = program_line()
        if self.sync_debug_mode == "error":
            return f"called a synchronizing CUDA operation ({why} at {place})"
        self.waits[why, place] += 1
        return ""


class Counts:
    """waits: by (why, line); launches: by operator or kernel."""

    waits: Counter[tuple[str, str]]
    launches: Counter[str]

    def table(self) -> str:
        rows = [f"{n:5d}  {why:40s} {line}" for (why, line), n in self.waits.most_common()]
        return "\n".join(["", *rows])


def program_line() -> str:
    """file:line of the innermost frame of the program in this thread, else of a test; a thread of
    autograd has no frame, and is asked for by the one that waits in backward()."""
    # Not this frame: it would hold itself, and with it all of its callers.
    innermost = sys._getframe(1)
    found = _line_of(innermost, PROGRAM)
    if found is None and threading.current_thread() is not threading.main_thread():
        found = next(filter(None, map(_line_of_backward, sys._current_frames().values())), None)
    return found or _line_of(innermost, (str(ROOT / "tests"),)) or "?"


def _line_of_backward(frame: FrameType) -> str | None:
    """Where a thread called backward(), if it is in there."""
    if frame.f_code.co_name != "_engine_run_backward":
        return None
    return _line_of(frame, PROGRAM) or _line_of(frame, (str(ROOT / "tests"),))


def _line_of(frame: FrameType | None, folders: tuple[str, ...]) -> str | None:
    here = f"{Path(__file__).parent}/"
    while frame is not None:
        name = frame.f_code.co_filename
        ours = name.startswith(here) and not name.startswith(f"{here}test_")
        if name.startswith(folders) and not ours:
            return f"{Path(name).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return None


def _unchecked_operators() -> set[str]:
    """Those whose generated CUDA wrapper does not compare the devices of their tensors."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    # Not by a YAML parser, which takes seconds for its 16,000 lines.
    entries = path.read_text().split("\n- func: ")[1:]
    unchecked = (entry for entry in entries if re.search(r"^  device_check: NoCheck", entry, re.M))
    return {f"aten::{entry.partition('(')[0]}" for entry in unchecked}
