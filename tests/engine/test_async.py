"""AsyncLLM: callers share the steps, leave when they like, and all hear of an error."""

import asyncio
import threading
import time

import pytest

from softgrpo_engine import AsyncLLM, SamplingParams, SoftParams

PARAMS = SamplingParams(max_tokens=12, seed=1, ignore_eos=True)
SOFT = SoftParams()


def run(main):
    """No test of this file may hang."""
    return asyncio.run(asyncio.wait_for(main, timeout=20))


def assert_idle(llm):
    metrics = llm.metrics()
    assert metrics["running"] == metrics["waiting"] == 0
    assert metrics["kv_pages_free"] == metrics["kv_pages"]


def count_steps(llm):
    """Every step of the engine from now on: the thread it ran in."""
    threads, step = [], llm.step

    def counted():
        threads.append(threading.current_thread())
        return step()

    llm.step = counted
    return threads


def test_concurrent_callers_share_the_steps_and_get_their_own_samples(make_llm, prompts):
    expected = make_llm().generate(prompts, PARAMS, SOFT, progress=False)
    llm = make_llm()
    threads = count_steps(llm)

    async def streamed(engine, prompt):
        return [sample async for _, sample in engine.stream(prompt, PARAMS, SOFT)]

    async def main():
        engine = AsyncLLM(llm)
        calls = [engine.generate(prompt, PARAMS, SOFT) for prompt in prompts[:3]]
        calls += [streamed(engine, prompt) for prompt in prompts[3:]]
        return await asyncio.gather(*calls)

    results = run(main())
    for output, want in zip(results[:3], expected[:3], strict=True):
        assert output[0].prompt_token_ids == want.prompt_token_ids
        assert output[0].samples[0].token_ids == want.samples[0].token_ids
    for samples, want in zip(results[3:], expected[3:], strict=True):
        lengths = [len(sample.token_ids) for sample in samples]
        assert lengths == sorted(set(lengths))
        assert samples[-1].token_ids == want.samples[0].token_ids
        assert samples[-1].finish_reason == "length"
    # One after the other would be 6 * 12 steps.
    assert len(threads) < 3 * PARAMS.max_tokens
    assert set(threads) & {threading.main_thread()} == set()
    assert len(set(threads)) == 1
    assert_idle(llm)


def test_streams_share_the_reads_of_the_record(make_llm, prompts):
    llm, reads = make_llm(), []
    read = llm.runner.record.soft_tokens

    def counted(sequences):
        reads.append(len(sequences))
        return read(sequences)

    llm.runner.record.soft_tokens = counted
    checks, check = [], llm.scheduler.check
    llm.scheduler.check = lambda: checks.append(check())

    async def main():
        engine = AsyncLLM(llm)

        async def texts(prompt):
            return [sample async for _, sample in engine.stream(prompt, PARAMS, SOFT)]

        return await asyncio.gather(*map(texts, prompts))

    assert all(samples[-1].finish_reason == "length" for samples in run(main()))
    # One for each token of each of the six would be 72.
    assert len([size for size in reads if size]) < 2.5 * PARAMS.max_tokens
    # They end in one step: the pages are accounted for when the first is released.
    assert 1 <= len(checks) < len(prompts)


def test_a_step_does_not_block_the_event_loop(make_llm, prompts):
    llm = make_llm()
    step = llm.step

    def slow():
        time.sleep(0.3)
        return step()

    llm.step = slow

    async def main():
        call = asyncio.ensure_future(
            AsyncLLM(llm).generate(prompts[0], SamplingParams(max_tokens=2))
        )
        longest, last = 0.0, time.perf_counter()
        while not call.done():
            await asyncio.sleep(0.001)
            longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
        return longest

    assert run(main()) < 0.25


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_cancelled_caller_takes_its_samples_out(make_llm, prompts, after):
    """after: turns of the event loop; with 0 and 1 it is still submitting."""
    expected = make_llm().generate(prompts[3], PARAMS, SOFT, progress=False)[0].samples[0]
    llm = make_llm()
    endless = SamplingParams(max_tokens=200, ignore_eos=True)

    async def main():
        engine = AsyncLLM(llm)
        leaver = asyncio.ensure_future(engine.generate(prompts[0], endless))
        stayer = asyncio.ensure_future(engine.generate(prompts[3], PARAMS, SOFT))
        for _ in range(after):
            await asyncio.sleep(0)
        if after > 1:
            while llm.metrics()["generated_tokens"] == 0:
                await asyncio.sleep(0.001)
        leaver.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaver
        return (await stayer)[0].samples[0]

    assert run(main()).token_ids == expected.token_ids
    assert llm.metrics()["generated_tokens"] < 100
    assert_idle(llm)


def test_a_stream_left_early_and_an_abort_by_name(make_llm, prompts):
    llm = make_llm()
    endless = SamplingParams(max_tokens=200, ignore_eos=True, seed=1)

    async def main():
        engine = AsyncLLM(llm)
        stream = engine.stream(prompts[0], endless)
        await anext(stream)
        await stream.aclose()
        assert_idle(llm)
        seen = []
        async for _, sample in engine.stream(prompts[0], endless):
            seen.append(sample)
            if len(sample.token_ids) == 3:
                await engine.abort(sample)
        return seen[-1]

    last = run(main())
    assert last.finish_reason == "abort"
    assert len(last.token_ids) <= 4
    assert_idle(llm)


def test_an_error_in_a_step_reaches_every_caller_and_the_engine_goes_on(make_llm, prompts):
    llm = make_llm()
    execute, steps = llm.runner.run, []

    def broken(plan):
        steps.append(plan)
        if len(steps) == 4:
            raise RuntimeError("the device is gone")
        return execute(plan)

    llm.runner.run = broken

    async def slow_reader(engine):
        """Is not waiting for a step when it fails."""
        async for _ in engine.stream(prompts[1], PARAMS):
            await asyncio.sleep(0.2)

    async def main():
        engine = AsyncLLM(llm)
        calls = [engine.generate(prompt, PARAMS) for prompt in prompts[2:5]]
        results = await asyncio.gather(slow_reader(engine), *calls, return_exceptions=True)
        return results, await engine.generate(prompts[0], PARAMS)

    results, later = run(main())
    assert [str(result) for result in results] == ["the device is gone"] * 4
    assert later[0].samples[0].finish_reason == "length"
    assert_idle(llm)


def test_a_bad_request_is_refused_and_disturbs_nobody(make_llm, prompts):
    llm = make_llm()

    async def main():
        engine = AsyncLLM(llm)
        good = asyncio.ensure_future(engine.generate(prompts[0], PARAMS))
        with pytest.raises(ValueError, match="prompt 0 is empty"):
            await engine.generate([[]], PARAMS)
        return await good

    assert run(main())[0].samples[0].finish_reason == "length"


def test_an_engine_whose_thread_is_gone_says_so(make_llm, prompts):
    engine = AsyncLLM(make_llm())
    run(engine.generate(prompts[0], SamplingParams(max_tokens=2)))
    assert engine.failure is None
    engine._worker.shutdown()
    with pytest.raises(RuntimeError):
        run(engine.generate(prompts[0], SamplingParams(max_tokens=2)))
    assert isinstance(engine.failure, RuntimeError)
