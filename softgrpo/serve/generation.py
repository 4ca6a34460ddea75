"""The routes that generate: from a body to choices, whole or as events."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import lru_cache
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from softgrpo.serve.admission import Admission, check_key, read_body
from softgrpo.serve.answers import Answers
from softgrpo.serve.deltas import Deltas
from softgrpo.serve.errors import ApiError, engine_failed
from softgrpo.serve.jobs import Job, Preparation
from softgrpo.serve.metrics import Metrics
from softgrpo.serve.protocol import Request, parse_request
from softgrpo.serve.settings import ServeSettings
from softgrpo.serve.stream import Disconnected, send_events, unless_disconnected
from softgrpo_engine import LLM, AsyncLLM, Output
from softgrpo_engine.requests.prompts import thinking_end_id

_LOG = logging.getLogger("softgrpo.serve")
# In the scope of a request whose client went before its end.
LEFT = "softgrpo.left"


class Generator:
    """What the generating routes share: the engine, the queue, the counters."""

    def __init__(self, llm: LLM, settings: ServeSettings) -> None:
        self.settings = settings
        self.engine = AsyncLLM(llm)
        self.admission = Admission(llm.runner.max_batch_size + settings.max_waiting)
        self.metrics = Metrics()
        self.created = int(time.time())
        self._preparation = Preparation(llm)
        self._thread = ThreadPoolExecutor(1, "softgrpo-prompts")
        self.tokenizer = self._preparation.tokenizer
        self.token_text = lru_cache(maxsize=None)(lambda token: self.tokenizer.decode([token]))
        end = thinking_end_id("auto", self.tokenizer)
        self.thinking_end = end if settings.split_thinking else None

    async def job(self, request: Request) -> Job:
        """The request made ready; raises ApiError for what cannot be done."""
        name = self.settings.name
        if request.model not in (None, name):
            raise ApiError(
                404, f"there is no model {request.model!r:.80}: this is {name!r}", "model"
            )
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._preparation.job, request)

    def answers(self, request: Request) -> Answers:
        return Answers(request, self.tokenizer, self.token_text, self.thinking_end)


class Generation:
    """One of the two routes, an ASGI application."""

    def __init__(self, generator: Generator, *, is_chat: bool) -> None:
        self._generator, self._is_chat = generator, is_chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.monotonic()
        try:
            await self._answer(HttpRequest(scope, receive), send, start)
        except Disconnected:
            scope[LEFT] = True  # its samples are out of the engine; there is nobody to tell
        else:
            self._generator.metrics.request.add(time.monotonic() - start)

    async def _answer(self, http: HttpRequest, send: Send, start: float) -> None:
        generator = self._generator
        check_key(http, generator.settings.api_key)
        request = parse_request(
            await read_body(http),
            is_chat=self._is_chat,
            default_soft=generator.settings.soft,
        )
        with generator.admission.room_for(len(request.prompts) * request.params.n):
            job = await generator.job(request)
            if request.stream:
                events = _events(generator, job, start)
                await unless_disconnected(http.receive, send_events(send, events))
            else:
                body = await unless_disconnected(http.receive, _whole(generator, job))
                await JSONResponse(body)(http.scope, http.receive, send)


async def _whole(generator: Generator, job: Job) -> dict[str, Any]:
    """The body of an answer."""
    request = job.request
    try:
        outputs = await generator.engine.generate(
            job.prompts, job.params, request.soft, uids=job.uids, stream=request.noise_stream
        )
    except Exception:
        _LOG.exception("the engine failed")
        raise engine_failed() from None
    answers = generator.answers(request)
    pairs = [(output, sample) for output in outputs for sample in output.samples]
    choices = [answers.choice(i, *pair) for i, pair in enumerate(pairs)]
    kind = "chat.completion" if request.is_chat else "text_completion"
    return {**_head(generator, request, kind), "choices": choices, "usage": _usage(job, outputs)}


async def _events(generator: Generator, job: Job, start: float) -> AsyncGenerator[dict[str, Any]]:
    """The events of a stream, each made when it is asked for."""
    request, answers = job.request, generator.answers(job.request)
    head = _head(
        generator, request, "chat.completion.chunk" if request.is_chat else "text_completion"
    )
    n = job.params.n
    deltas = [Deltas(answers, i) for i in range(len(job.prompts) * n)]
    tokens = [0] * len(deltas)
    samples = generator.engine.stream(
        job.prompts, job.params, request.soft, uids=job.uids, stream=request.noise_stream
    )
    try:
        async with aclosing(samples):  # type: ignore[type-var]
            async for prompt, sample in samples:
                if not any(tokens):
                    generator.metrics.first_token.add(time.monotonic() - start)
                index = prompt * n + job.uids[prompt].index(sample.uid)
                tokens[index] = len(sample.token_ids)
                choice = deltas[index].next(sample)
                if choice is not None:
                    yield {**head, "choices": [choice]}
    except Exception:
        _LOG.exception("the engine failed")
        raise engine_failed() from None
    if request.include_usage:
        yield {**head, "choices": [], "usage": _counts(job, sum(tokens))}


def _head(generator: Generator, request: Request, kind: str) -> dict[str, Any]:
    return {
        "id": f"{'chatcmpl' if request.is_chat else 'cmpl'}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": generator.settings.name,
    }


def _usage(job: Job, outputs: list[Output]) -> dict[str, int]:
    return _counts(job, sum(len(s.token_ids) for output in outputs for s in output.samples))


def _counts(job: Job, generated: int) -> dict[str, int]:
    prompt = sum(map(len, job.prompts))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
    }
