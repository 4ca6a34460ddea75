"""The engine for asyncio: callers share the steps, and the event loop is never blocked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Literal, TypeVar

import torch

from softgrpo_engine.llm import LLM
from softgrpo_engine.outputs import Output, Sample
from softgrpo_engine.params import SamplingParams, SoftParams
from softgrpo_engine.requests.call import Call, news_of
from softgrpo_engine.requests.prompts import Prompt
from softgrpo_engine.transfer import check_device

T = TypeVar("T")


class AsyncLLM:
    """`generate` and `stream` of an LLM for concurrent callers.

        engine = AsyncLLM(LLM("smollm2-135m"))
        async for index, sample in engine.stream("What is 2 + 3?"): ...

    All work of the engine is done in one thread, step by step; a step computes the samples of every
    caller. A caller that is cancelled takes its samples out, those of the others go on. What a step
    raises reaches every caller whose samples were in progress. Use the LLM itself only while no
    caller is waiting.

    failure: the error after which nothing can be computed any more: the device does not answer
    since, or the thread is gone. None while the engine works.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        # A new thread starts with the default number of OpenMP threads.
        self._worker = ThreadPoolExecutor(
            1, "softgrpo-engine", torch.set_num_threads, (torch.get_num_threads(),)
        )
        self.failure: Exception | None = None
        self._step: asyncio.Future[Any] | None = None
        self._asking: list[Call] = []
        self._reading: asyncio.Future[dict[Call, Iterator[tuple[int, Sample]]]] | None = None

    async def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        params: SamplingParams | None = None,
        soft: SoftParams | Literal[False] | None = None,
        *,
        uids: Seq[Seq[int]] | None = None,
        stream: int = 0,
    ) -> list[Output]:
        """As `LLM.generate`; uids and stream as of `LLM.submit`."""
        submit = partial(self.llm.submit, prompts, params, soft, uids=uids, stream=stream)
        async with self._call(submit) as call:
            outputs = dict(call.ended())
            while not call.is_done:
                await self._next_step()
                outputs.update(call.ended())
            return [outputs[i] for i in range(len(outputs))]

    async def stream(
        self,
        prompts: Prompt | Seq[Prompt],
        params: SamplingParams | None = None,
        soft: SoftParams | Literal[False] | None = None,
        *,
        uids: Seq[Seq[int]] | None = None,
        stream: int = 0,
    ) -> AsyncIterator[tuple[int, Sample]]:
        """As `LLM.stream`, uids and stream as of `LLM.submit`. To a slow reader an item can bring
        several new tokens."""
        submit = partial(self.llm.submit, prompts, params, soft, uids=uids, stream=stream)
        async with self._call(submit) as call:
            while not call.is_read:
                if not call.has_news:
                    await self._next_step()
                    continue
                for item in await self._news(call):
                    yield item

    async def abort(self, sample: Sample) -> None:
        """As `LLM.abort`."""
        await self._on_worker(lambda: self.llm.abort(sample))

    async def metrics(self) -> dict[str, float]:
        """As `LLM.metrics`, between two steps."""
        return await self._on_worker(self.llm.metrics)

    @asynccontextmanager
    async def _call(self, submit: Callable[[], Call]) -> AsyncIterator[Call]:
        """Submits the samples, and takes them out in the end however that comes."""
        calls: list[Call] = []

        def release() -> None:
            for call in calls:
                self.llm.release(call)

        try:
            await self._on_worker(lambda: calls.append(submit()))
            yield calls[0]
        finally:
            # The worker keeps the order: also a caller that was cancelled while it submitted is
            # found here.
            await asyncio.shield(self._on_worker(release))

    async def _news(self, call: Call) -> Iterator[tuple[int, Sample]]:
        """Of a call; the callers that wait for the same step share one read of the record."""
        self._asking.append(call)
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._read_news())
        return (await asyncio.shield(self._reading))[call]

    async def _read_news(self) -> dict[Call, Iterator[tuple[int, Sample]]]:
        await asyncio.sleep(0)  # by now all of them ask
        calls, self._asking, self._reading = self._asking, [], None
        news = await self._on_worker(partial(news_of, calls))
        return dict(zip(calls, news, strict=True))

    async def _next_step(self) -> None:
        """Waits for the step in progress, or for a new one: the callers share it."""
        if self._step is None or self._step.done():
            self._step = self._on_worker(self.llm.step)
        await asyncio.shield(self._step)

    def _on_worker(self, work: Callable[[], T]) -> asyncio.Future[T]:
        try:
            guarded = partial(self._guarded, work)
            return asyncio.get_running_loop().run_in_executor(self._worker, guarded)
        except RuntimeError as error:  # the thread takes no work
            self.failure = self.failure or error
            raise

    def _guarded(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except RuntimeError as error:
            try:
                check_device(self.llm.device)
            except RuntimeError:
                self.failure = self.failure or error
            raise
