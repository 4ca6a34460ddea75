"""Whatever vLLM does with a request on its way, its record is the same."""

import pytest
import torch
from records import asked, generate, records, same

from softgrpo_vllm.history import History


def requests(count):
    """Of one length, so that all of them grow out of the KV cache at once."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, 97, (count, 40), generator=generator).tolist()
    return prompts, [asked(uid, {"max_tokens": 40}, tau=1.0) for uid in range(count)]


@pytest.fixture(scope="module")
def expected(vllm):
    return records(vllm, *requests(4))


def check(found, expected):
    for record, other in zip(found, expected, strict=True):
        assert same(record.soft, other.soft, atol=1e-3)


@pytest.fixture
def preempted(monkeypatch):
    """Request ids that a scheduler has preempted."""
    from vllm.v1.core.sched.scheduler import Scheduler

    seen, preempt = [], Scheduler._preempt_request

    def counting(self, request, *rest, **options):
        seen.append((request.request_id, request.num_output_tokens))
        return preempt(self, request, *rest, **options)

    monkeypatch.setattr(Scheduler, "_preempt_request", counting)
    return seen


def test_a_preempted_request_goes_on_from_its_record(make, expected, preempted):
    # 9 blocks of 32 positions; prefills in chunks of 24, so that mixtures are computed again.
    llm = make(num_gpu_blocks_override=9, max_num_batched_tokens=24, max_num_seqs=16)
    prompts, params = requests(4)
    check(records(llm, prompts, params), expected)
    assert any(tokens > 0 for _, tokens in preempted)


def test_without_its_record_a_request_does_not_come_back(make, monkeypatch, preempted):
    from softgrpo_vllm import rows

    monkeypatch.setattr(rows, "History", lambda: History(shelf_bytes=0))
    llm = make(num_gpu_blocks_override=9)
    with pytest.raises(RuntimeError, match="comes back after its soft tokens were dropped"):
        records(llm, *requests(4))


def test_asynchronous_scheduling(make, expected, preempted, monkeypatch):
    """On a CPU vLLM has it off; nothing of it hangs on a GPU."""
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config.__func__

    def asynchronous(cls, vllm_config):
        update(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(asynchronous))
    llm = make(num_gpu_blocks_override=9)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    assert type(scheduler).__name__ == "SoftAsyncScheduler"
    check(records(llm, *requests(4)), expected)
    assert preempted


def follow_up(llm, prompts):
    """A soft answer, then a text that quotes it: its first log-probabilities, and how many of its
    tokens were found in the cache."""
    from vllm import SamplingParams

    sampling, soft = {"max_tokens": 64, "ignore_eos": True}, {"tau": 3.0, "top_p": 1.0, "top_k": 8}
    params = asked(9, sampling, **soft, end_of_thinking=-1)
    (answer,) = generate(llm, prompts[2:3], [params])
    prompt = {"prompt_token_ids": [*prompts[2], *answer.token_ids, 9]}
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=5)
    (out,) = llm.generate([prompt], params, use_tqdm=False)
    return {i: p.logprob for i, p in out.outputs[0].logprobs[0].items()}, out.num_cached_tokens


def test_a_text_that_quotes_a_soft_answer_is_computed_anew(make, vllm, prompts):
    fresh, cached = follow_up(make(enable_prefix_caching=False), prompts)
    assert not cached
    found, cached = follow_up(vllm, prompts)
    assert cached == 32  # the full block of the prompt
    assert found == pytest.approx(fresh, abs=1e-4)


def test_stock_hashes_would_give_it_the_soft_keys_and_values(make, prompts, monkeypatch):
    """The control."""
    from softgrpo_vllm import scheduler

    fresh, _ = follow_up(make(enable_prefix_caching=False), prompts)
    monkeypatch.setattr(scheduler, "is_soft", lambda params: False)
    found, cached = follow_up(make(), prompts)
    assert cached > 32
    assert max(abs(fresh[i] - found.get(i, 0.0)) for i in fresh) > 1e-2


def test_the_shelf_is_bounded_and_keeps_the_latest():
    from softgrpo_kernels import soft_token

    history = History(shelf_bytes=5 * 4 * 129)
    drawn = soft_token(torch.randn(3, 50), top_k=4, k_max=8, mode=2)
    for name in "abc":
        history.start(name, 0)
    for _ in range(2):
        history.add(["a", "b", "c"], drawn)
    for name in "abc":  # of six positions five fit
        history.leave(name)
    with pytest.raises(RuntimeError, match="request a comes back after"):
        history.start("a", 2)
    history.start("c", 1)
    ids, gprime, kind = history.read("c", torch.device("cpu"))
    assert torch.equal(ids, drawn.ids[2:])
    assert torch.equal(gprime, drawn.gprime[2:])
    assert torch.equal(kind, drawn.kind[2:])
    history.start("new", 0)
