"""Who is let in: the key, the size of a body, and room in the queue."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from softgrpo.serve.errors import ApiError
from softgrpo.serve.settings import ServeSettings
from softgrpo.serve.stream import Disconnected

MOST_BYTES = 4 * 2**20
_BODY_SECONDS = 30.0


class Admission:
    """Counts the samples that were let in; each is in the engine's batch or in its queue.

    capacity: most of them at once. A request holds its samples until its answer has been sent.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.samples = 0
        self._usual_seconds = 1.0  # of recent requests

    @contextmanager
    def room_for(self, samples: int) -> Iterator[None]:
        """Holds room for so many samples, or raises ApiError: 429 where it may come free."""
        if samples > self.capacity:
            message = f"{samples} samples in one request: this server takes {self.capacity} at once"
            raise ApiError(400, message)
        if self.samples + samples > self.capacity:
            message = f"the queue is full ({self.samples} samples): try again later"
            raise ApiError(429, message, retry_after=min(60, math.ceil(self._usual_seconds)))
        self.samples += samples
        start = time.monotonic()
        try:
            yield
        finally:
            self.samples -= samples
            self._usual_seconds += 0.1 * (time.monotonic() - start - self._usual_seconds)


def check_caller(http: HttpRequest, settings: ServeSettings) -> None:
    """Raises ApiError unless the request has the server's key, or the server has none. Then its
    user's browser could be made to send requests by any page of the web: those are refused."""
    if settings.api_key is not None:
        # Headers are read as Latin-1.
        given = http.headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")
        if not secrets.compare_digest(given, os.fsencode(settings.api_key)):
            raise ApiError(401, "wrong API key: send it as Authorization: Bearer KEY")
        return
    if http.headers.get("sec-fetch-site") == "cross-site":
        raise ApiError(403, "this server has no --api-key: it takes nothing from other sites")
    host = http.headers.get("host", "")
    if settings.is_local and not _is_private(host):
        message = f"this server does not go by the name {host!r:.80}: give it an --api-key first"
        raise ApiError(403, message)


def check_model(name: str, settings: ServeSettings) -> None:
    """Raises ApiError unless this is the model."""
    if name != settings.name:
        message = f"there is no model {name!r:.80}: this is {settings.name!r}"
        raise ApiError(404, message, "model")


def _is_private(host: str) -> bool:
    """Whether no page of the web can have this name: one that has can let it lead to this machine
    (DNS rebinding), and then read the answers."""
    address = re.fullmatch(r"\[(.*)\]|([^:]*)", re.sub(r":\d*$", "", host))
    if address is None:
        return False
    name = (address[1] or address[2] or "").rstrip(".").lower()
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return "." not in name or name.endswith((".localhost", ".local", ".internal"))
    return True


async def read_body(http: HttpRequest) -> bytes:
    """The whole body. Raises ApiError for one that is too large or does not come, Disconnected."""
    length = http.headers.get("content-length", "0")
    too_large = ApiError(413, f"the body is too large: at most {MOST_BYTES} bytes")
    if not length.isdecimal() or len(length) > 9 or int(length) > MOST_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in http.stream():
                body += chunk
                if len(body) > MOST_BYTES:
                    raise too_large
    except ClientDisconnect:
        raise Disconnected from None
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {_BODY_SECONDS:.0f} s") from None
    return bytes(body)
