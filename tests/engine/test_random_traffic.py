"""Random arrivals, aborts and ends with a preemption forced at every step: the same samples."""

import random

import pytest
import torch

from softgrpo_engine import SamplingParams, SoftParams

SOFT = SoftParams(tau=0.8, end_of_thinking="</think>", max_soft_tokens=9)


def params(rng):
    return SamplingParams(max_tokens=rng.randint(1, 24), seed=7, top_k=4, stop_token_ids=(5, 9))


@pytest.fixture(scope="module")
def requests(prompts):
    rng = random.Random(3)
    return [(rng.choice(prompts), params(rng)) for _ in range(48)]


@pytest.fixture(scope="module")
def alone(make_llm_on, requests):
    """Each by itself, on the CPU."""
    single = make_llm_on("cpu", max_batch_size=1)
    samples = {}
    for prompt, settings in requests:
        (output,) = single.generate(prompt, settings, SOFT, progress=False)
        samples[tuple(prompt), settings.max_tokens] = output.samples[0]
    return samples


@pytest.mark.parametrize("overlap", [False, True])
def test_a_preemption_at_every_step_changes_no_sample(make_llm, requests, alone, overlap):
    rng = random.Random(4)
    llm = make_llm(pages=9, max_batch_size=6, max_batch_tokens=24)
    llm.overlap = overlap
    schedule = llm.scheduler.schedule

    def preempt_one_first():
        """All but the oldest may lose their pages: it brings the work forward."""
        running = llm.scheduler.running
        if len(running) > 1:
            llm.scheduler._preempt(rng.choice(running[1:]))
        return schedule()

    llm.scheduler.schedule = preempt_one_first
    calls, waiting, ended = [], list(requests), []
    aborted = 0
    while waiting or calls:
        if waiting and rng.random() < 0.5:
            prompt, settings = waiting.pop()
            calls.append((llm.submit(prompt, settings, SOFT), prompt, settings))
        if calls and rng.random() < 0.04:
            llm.release(calls.pop(rng.randrange(len(calls)))[0])  # as a caller that goes away
            aborted += 1
        llm.step()
        llm.scheduler.check()
        for entry in list(calls):
            call, prompt, settings = entry
            for _, output in call.ended():
                ended.append((output.samples[0], alone[tuple(prompt), settings.max_tokens]))
                calls.remove(entry)
    metrics = llm.metrics()
    assert metrics["preemptions"] > 100
    assert metrics["kv_pages_free"] == metrics["kv_pages"]
    assert aborted >= 2
    assert {sample.finish_reason for sample, _ in ended} == {"stop", "length"}
    assert len(ended) == len(requests) - aborted
    for sample, expected in ended:
        assert sample.token_ids == expected.token_ids
        assert sample.finish_reason == expected.finish_reason
        assert torch.equal(sample.soft.ids, expected.soft.ids)
        assert torch.equal(sample.soft.kind, expected.soft.kind)
        torch.testing.assert_close(sample.soft.gprime, expected.soft.gprime, atol=2e-5, rtol=0)
        torch.testing.assert_close(sample.logprobs, expected.logprobs, atol=2e-5, rtol=0)
