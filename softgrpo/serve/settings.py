"""How a server was started."""

from __future__ import annotations

from dataclasses import dataclass

from softgrpo_engine import SoftParams


@dataclass(frozen=True)
class ServeSettings:
    """name: of the model, as clients call it. soft: how a request that says nothing of it is
    drawn, None for discretely. max_waiting: samples in the queue beside those of the batch.
    api_key: what clients must send, None for nothing. split_thinking: what comes before the end of
    thinking is sent as reasoning_content. is_local: only this machine reaches it."""

    name: str
    soft: SoftParams | None = None
    max_waiting: int = 256
    api_key: str | None = None
    split_thinking: bool = False
    is_local: bool = True
