"""Counters in Prometheus' text format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
# Of `LLM.metrics`: kind and what it says.
_ENGINE = {
    "generated_tokens": ("counter", "tokens generated"),
    "prompt_tokens_computed": ("counter", "prompt tokens computed"),
    "prefix_tokens_reused": ("counter", "prompt tokens found in the cache"),
    "preemptions": ("counter", "samples put back to be computed again"),
    "running": ("gauge", "samples in the batch"),
    "waiting": ("gauge", "samples in the queue"),
    "kv_use": ("gauge", "share of the KV cache in use"),
    "tokens_per_second_recent": ("gauge", "generated tokens a second of work, last ten seconds"),
}


class Histogram:
    """Seconds, in the buckets of _SECONDS."""

    def __init__(self) -> None:
        self.counts = [0] * (len(_SECONDS) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        self.counts[sum(seconds > edge for edge in _SECONDS)] += 1
        self.sum += seconds

    def lines(self, name: str) -> Iterator[str]:
        total = 0
        for edge, count in zip((*_SECONDS, "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{edge}"}} {total}'
        yield f"{name}_sum {self.sum:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """What the server did. requests: by (route, status); 499 is a client that left."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.first_token = Histogram()
        self.request = Histogram()

    def text(self, engine: Mapping[str, float]) -> str:
        """All of it, with what `LLM.metrics` says."""
        return "\n".join(self._lines(engine)) + "\n"

    def _lines(self, engine: Mapping[str, float]) -> Iterator[str]:
        yield from _head("softgrpo_requests_total", "counter", "requests by route and status")
        for (route, status), count in sorted(self.requests.items()):
            labels = f'route="{route}",status="{status}"'
            yield f"softgrpo_requests_total{{{labels}}} {count}"
        for name, (kind, says) in _ENGINE.items():
            full = f"softgrpo_{name}" + ("_total" if kind == "counter" else "")
            yield from _head(full, kind, says)
            yield f"{full} {engine[name]:g}" if kind == "gauge" else f"{full} {int(engine[name])}"
        first, whole = "softgrpo_time_to_first_token_seconds", "softgrpo_request_seconds"
        yield from _head(first, "histogram", "until the first token of a stream")
        yield from self.first_token.lines(first)
        yield from _head(whole, "histogram", "until the end of an answer")
        yield from self.request.lines(whole)


def _head(name: str, kind: str, says: str) -> tuple[str, str]:
    return f"# HELP {name} {says}", f"# TYPE {name} {kind}"
