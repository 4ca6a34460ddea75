"""The routes that generate: from a body to choices, whole or as events."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from softgrpo.serve.admission import Admission, check_caller, check_model, read_body
from softgrpo.serve.answers import Answers
from softgrpo.serve.deltas import Deltas
from softgrpo.serve.errors import engine_failed
from softgrpo.serve.jobs import Job, Preparation
from softgrpo.serve.metrics import Metrics
from softgrpo.serve.protocol import Request, parse_request
from softgrpo.serve.settings import ServeSettings
from softgrpo.serve.stream import Disconnected, send_events, unless_disconnected
from softgrpo.serve.tokens import TokenTexts
from softgrpo_engine import LLM, AsyncLLM, Output
from softgrpo_engine.requests.prompts import thinking_end_id

T = TypeVar("T")

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
        self._thread = ThreadPoolExecutor(1, "softgrpo-texts")
        self.tokens = TokenTexts(self._preparation.tokenizer)
        end = thinking_end_id("auto", self._preparation.tokenizer)
        self.thinking_end = end if settings.split_thinking else None

    async def job(self, request: Request) -> Job:
        """The request made ready; raises ApiError for what cannot be done."""
        if request.model is not None:
            check_model(request.model, self.settings)
        return await self.in_thread(partial(self._preparation.job, request))

    def in_thread(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Done beside the event loop, one after the other: they share a tokenizer."""
        return asyncio.get_running_loop().run_in_executor(self._thread, work)

    def answers(self, request: Request) -> Answers:
        return Answers(request, self.tokens, self.thinking_end)


class Generation:
    """One of the two routes, an ASGI application."""

    def __init__(self, generator: Generator, *, is_chat: bool) -> None:
        self._generator, self._is_chat = generator, is_chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.monotonic()
        try:
            await self._answer(HttpRequest(scope, receive), send, start)
        except (Disconnected, asyncio.CancelledError):  # or the server was told to end at once
            scope[LEFT] = True  # its samples are out of the engine; there is nobody to tell
        else:
            self._generator.metrics.request.add(time.monotonic() - start)

    async def _answer(self, http: HttpRequest, send: Send, start: float) -> None:
        generator = self._generator
        check_caller(http, generator.settings)
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
                answer = await unless_disconnected(http.receive, _whole(generator, job))
                await answer(http.scope, http.receive, send)


async def _whole(generator: Generator, job: Job) -> JSONResponse:
    """An answer."""
    request = job.request
    try:
        outputs = await generator.engine.generate(
            job.prompts, job.params, request.soft, uids=job.uids, stream=request.noise_stream
        )
    except Exception:
        _LOG.exception("the engine failed")
        raise engine_failed() from None
    # Many tokens with all their candidates take seconds to write: not in the event loop.
    return await generator.in_thread(partial(_response, generator, job, outputs))


def _response(generator: Generator, job: Job, outputs: list[Output]) -> JSONResponse:
    answers = generator.answers(job.request)
    pairs = [(output, sample) for output in outputs for sample in output.samples]
    choices = [answers.choice(i, *pair) for i, pair in enumerate(pairs)]
    head = _head(
        generator, job.request, "chat.completion" if job.request.is_chat else "text_completion"
    )
    return JSONResponse({**head, "choices": choices, "usage": _usage(job, outputs)})


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
    if job.request.max_tokens == 0:
        return _counts(job, 0)
    return _counts(job, sum(len(s.token_ids) for output in outputs for s in output.samples))


def _counts(job: Job, generated: int) -> dict[str, int]:
    prompt = sum(map(len, job.prompts))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
    }
