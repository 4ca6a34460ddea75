"""What a supervised run shows: a bar, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from softgrpo.log.progress import can_redraw, stdout_console, write_line

_SECONDS = 2.0  # between two plain lines: a step may take milliseconds


class SupervisedProgress:
    """``with SupervisedProgress() as progress``: then `start`, and `step` after every step."""

    def __init__(self) -> None:
        console = stdout_console()
        self._is_live = can_redraw(console)
        self._bar = Progress(
            TextColumn("softgrpo · {task.fields[name]}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeRemainingColumn(),
            console=console,
            disable=not self._is_live,
        )
        self._total, self._last = 0, 0.0

    def __enter__(self) -> SupervisedProgress:
        self._bar.start()
        if self._is_live:
            # rich hides the cursor; a run that is killed could not bring it back.
            self._bar.console.show_cursor(True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def start(self, name: str, done: int, total: int) -> None:
        """Begins the run `name` of `total` steps."""
        self._total = total
        self._bar.add_task("", total=total, completed=done, name=name, numbers="")
        if not self._is_live:
            self.message(f"run {name}: {done} of {total} steps are done")

    def step(self, row: Mapping[str, Any]) -> None:
        """A step is done; `row` is its line of metrics.jsonl."""
        numbers = f"loss {row['loss']:.4f}"
        if "accuracy" in row:
            numbers += f"  accuracy {row['accuracy']:.3f}"
        numbers += f"  {row['tokens_per_second']:,.0f} tokens/s"
        if self._is_live:
            self._bar.update(self._bar.task_ids[0], completed=row["step"], numbers=numbers)
        elif row["step"] == self._total or time.monotonic() - self._last > _SECONDS:
            self._last = time.monotonic()
            self.message(f"step {row['step']}/{self._total}  {numbers}")

    def message(self, text: str) -> None:
        if self._is_live:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            write_line(self._bar.console, text)
