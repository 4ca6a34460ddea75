"""Answers on their way: server-sent events, and clients that leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.types import Receive, Send

from softgrpo.serve.errors import ApiError

T = TypeVar("T")

# A reader that takes nothing for so long has left.
SEND_SECONDS = 60.0
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Disconnected(Exception):
    """The client has left before the end of its answer."""


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Result of the work; it is cancelled, and waited for, when the client leaves."""
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(_leaving(receive))
    try:
        await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Disconnected
        return task.result()
    finally:
        task.cancel()
        left.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def _leaving(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_events(send: Send, events: AsyncGenerator[dict[str, Any]]) -> None:
    """Sends events until there are no more; nothing is read ahead of the client.

    An ApiError before the first event is raised, later it is the last event. Raises Disconnected
    for a client that does not read.
    """
    async with aclosing(events):
        event = await anext(events)
        await _send(send, {"type": "http.response.start", "status": 200, "headers": _HEADERS})
        try:
            while True:
                await _send_body(send, json.dumps(event), more=True)
                event = await anext(events)
        except StopAsyncIteration:
            pass
        except ApiError as error:
            await _send_body(send, json.dumps(error.body()), more=True)
        await _send_body(send, "[DONE]", more=False)


async def _send_body(send: Send, data: str, *, more: bool) -> None:
    body = f"data: {data}\n\n".encode()
    await _send(send, {"type": "http.response.body", "body": body, "more_body": more})


async def _send(send: Send, message: dict[str, Any]) -> None:
    try:
        async with asyncio.timeout(SEND_SECONDS):
            await send(message)
    except TimeoutError:
        raise Disconnected from None
