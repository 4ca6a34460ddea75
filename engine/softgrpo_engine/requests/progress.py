"""How fast the engine is: for ``LLM.metrics`` and the progress bar. No torch here."""

from __future__ import annotations

import time
from collections import deque

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from softgrpo_engine.scheduling.scheduler import Scheduler

_RECENT_SECONDS = 10.0


class TokenRate:
    """Generated tokens, and how many come in a second of work: idle time does not count."""

    def __init__(self) -> None:
        self.tokens = 0
        self._seconds = 0.0
        self._steps: deque[tuple[float, int, float]] = deque()  # (end, tokens, seconds)

    def add(self, tokens: int, seconds: float) -> None:
        """Counts a step that has just ended."""
        self.tokens += tokens
        self._seconds += seconds
        self._steps.append((time.monotonic(), tokens, seconds))
        self._drop_old()

    @property
    def overall(self) -> float:
        """Tokens/s over all steps; 0 before the first."""
        return self.tokens / self._seconds if self._seconds else 0.0

    @property
    def recent(self) -> float:
        """Tokens/s over the steps of the last ten seconds; 0 when there were none."""
        self._drop_old()
        seconds = sum(seconds for _, _, seconds in self._steps)
        return sum(tokens for _, tokens, _ in self._steps) / seconds if seconds else 0.0

    def _drop_old(self) -> None:
        oldest = time.monotonic() - _RECENT_SECONDS
        while self._steps and self._steps[0][0] < oldest:
            self._steps.popleft()


def load_metrics(scheduler: Scheduler, rate: TokenRate) -> dict[str, float]:
    """What was computed, how fast, and what is in progress now."""
    pool = scheduler.pool
    prompt_tokens = scheduler.prompt_tokens + scheduler.prefix_tokens
    return {
        "generated_tokens": rate.tokens,
        "tokens_per_second": rate.overall,
        "tokens_per_second_recent": rate.recent,
        "prompt_tokens_computed": scheduler.prompt_tokens,
        "prefix_tokens_reused": scheduler.prefix_tokens,
        "prefix_hit_rate": scheduler.prefix_tokens / max(1, prompt_tokens),
        "preemptions": scheduler.preemptions,
        "running": len(scheduler.running),
        "waiting": len(scheduler.active) - len(scheduler.running),
        "kv_pages": pool.num_pages,
        "kv_pages_free": pool.num_free,
        "kv_use": 1 - pool.num_free / pool.num_pages,
    }


def sample_progress(shown: bool) -> Progress:
    """A bar on stderr: samples done, tokens/s (the field ``rate`` of its task), time left."""
    return Progress(
        TextColumn("generating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("samples  {task.fields[rate]:.0f} tokens/s"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not shown,
        transient=True,
    )
