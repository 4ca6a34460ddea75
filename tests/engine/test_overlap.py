"""The host plans and reads while the device computes: on a GPU always, here in these tests."""

import pytest
import torch

from softgrpo_engine import SamplingParams, SoftParams
from softgrpo_engine.execution.runner import Launched

EOS = 1
FREE = SamplingParams(max_tokens=12, seed=3, ignore_eos=True)


@pytest.fixture
def make_overlapping(make_llm):
    def make(**options):
        llm = make_llm(**options)
        llm.overlap = True
        return llm

    return make


@pytest.fixture
def events(monkeypatch):
    """Launches and reads in their order."""
    seen = []
    read = Launched.read

    def recorded(launched):
        seen.append("read")
        return read(launched)

    monkeypatch.setattr(Launched, "read", recorded)
    return seen


def record_launches(llm, events):
    run = llm.runner.run

    def recorded(plan):
        events.append("launch")
        return run(plan)

    llm.runner.run = recorded


def samples(llm, prompts, params, soft):
    outputs = llm.generate(prompts, params, soft, progress=False)
    return [sample for output in outputs for sample in output.samples]


@pytest.mark.parametrize(
    "soft",
    [
        False,
        SoftParams(top_k=4, tau=0.7, end_of_thinking="</think>"),
        SoftParams(top_k=4, tau=0.7, end_of_thinking="</think>", max_soft_tokens=6),  # forced
        SoftParams(top_k=4, tau=0.7, end_of_thinking=None, max_soft_tokens=6),  # simply over
    ],
)
@pytest.mark.parametrize("pages", [None, 9])
def test_samples_are_the_same(make_llm, make_overlapping, prompts, soft, pages):
    """Ends by token, string and length; min_tokens; chunks of prompts, groups, preemption."""
    params = SamplingParams(
        n=3, max_tokens=20, min_tokens=3, seed=11, top_k=5, stop=("ab",), stop_token_ids=(5, 9)
    )
    options = {"pages": pages, "max_batch_tokens": 24, "max_batch_size": 7}
    overlapping = make_overlapping(**options)
    ours = samples(overlapping, prompts, params, soft)
    for a, b in zip(ours, samples(make_llm(**options), prompts, params, soft), strict=True):
        assert a.token_ids == b.token_ids
        assert (a.text, a.finish_reason) == (b.text, b.finish_reason)
        assert torch.equal(a.soft.ids, b.soft.ids)
        assert torch.equal(a.soft.forced, b.soft.forced)
        torch.testing.assert_close(a.soft.gprime, b.soft.gprime, atol=2e-5, rtol=0)
    metrics = overlapping.metrics()
    assert metrics["kv_pages_free"] == metrics["kv_pages"]


def test_a_step_is_read_behind_the_launch_of_the_next(make_overlapping, prompts, events):
    llm = make_overlapping()
    record_launches(llm, events)
    (sample,) = samples(llm, prompts[0], SamplingParams(max_tokens=4, ignore_eos=True), False)
    assert len(sample.token_ids) == 4
    # The last is not followed by one too many: its length was known.
    assert events == ["launch", "launch", "read", "launch", "read", "launch", "read", "read"]


def test_a_token_that_may_be_forced_is_read_first(make_overlapping, prompts, events):
    llm = make_overlapping()
    record_launches(llm, events)
    soft = SoftParams(top_k=4, tau=0.7, end_of_thinking="</think>", max_soft_tokens=1)
    params = SamplingParams(max_tokens=4, ignore_eos=True, seed=0)
    (sample,) = samples(llm, prompts[0], params, soft)
    assert sample.soft.forced.tolist() == [False, True, False, False]
    # Both positions at the budget; then the rest is discrete, and overlaps.
    assert events[:6] == ["launch", "read", "launch", "read", "launch", "launch"]


def test_a_stream_gives_every_token_once(make_llm, make_overlapping, prompts):
    lengths = [len(s.token_ids) for _, s in make_overlapping().stream(prompts[0], FREE)]
    assert sorted(set(lengths)) == list(range(1, 13))
    assert lengths == [len(s.token_ids) for _, s in make_llm().stream(prompts[0], FREE)]


def test_an_abort_meets_a_step_under_way(make_overlapping, prompts):
    llm = make_overlapping()
    call = llm.submit(prompts, FREE, False)
    for _ in range(4):
        llm.step()
    for sequence in call.sequences:
        llm.abort(sequence)
    ended = [output.samples[0] for _, output in call.ended()]
    assert {sample.finish_reason for sample in ended} == {"abort"}
    assert all(len(sample.soft.token) == len(sample.token_ids) for sample in ended)
    llm.release(call)
    # What was under way is nobody's.
    (later,) = samples(llm, prompts[0], FREE, False)
    assert len(later.token_ids) == 12


def test_an_error_ends_all_and_the_engine_goes_on(make_overlapping, prompts):
    llm = make_overlapping()
    call = llm.submit(prompts, FREE, False)
    for _ in range(3):
        llm.step()
    run, llm.runner.run = llm.runner.run, lambda plan: 1 / 0
    with pytest.raises(ZeroDivisionError):
        llm.step()
    llm.runner.run = run
    with pytest.raises(ZeroDivisionError):
        list(call.ended())
    llm.release(call)
    (later,) = samples(llm, prompts[0], FREE, False)
    assert len(later.token_ids) == 12
