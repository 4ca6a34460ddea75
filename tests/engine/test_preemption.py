"""A sample is the same however it came to be computed."""

import pytest
import torch
from simulated_gpu.plugin import CUDA

from softgrpo_engine import SamplingParams, SoftParams

PARAMS = SamplingParams(max_tokens=40, seed=11, ignore_eos=True, top_k=4)
# A real mixture until token 25 (so that pages of soft positions are recomputed), discrete after.
SOFT = SoftParams(tau=0.8, end_of_thinking="</think>", max_soft_tokens=25)
GROUP = 3


def run(llm, prompts):
    uids = [[100 * i + j for j in range(GROUP)] for i in range(len(prompts))]
    return llm.generate_groups(prompts, PARAMS, SOFT, seed=11, uids=uids)


@pytest.fixture(scope="module")
def alone(make_llm_on, prompts):
    """Every sample by itself in an engine of its own, on the CPU."""
    return [
        [
            make_llm_on("cpu", max_batch_size=1)
            .generate_groups([prompt], PARAMS, SOFT, seed=11, uids=[[100 * i + j]])[0]
            .samples[0]
            for j in range(GROUP)
        ]
        for i, prompt in enumerate(prompts)
    ]


# What each setting reaches: the whole batch at once; waiting for rows, siblings through the prefix
# cache; prompts cut into chunks beside decoding; fewer pages than the batch needs.
SETTINGS = {
    "all at once": {"max_batch_size": 32},
    "one by one": {"max_batch_size": 1},
    "three rows": {"max_batch_size": 3},
    "chunked prefill": {"max_batch_tokens": 7},
    "few pages": {"pages": 9, "max_batch_size": 32},
    "few pages, chunked": {"pages": 6, "max_batch_tokens": 10},
}


# On a GPU those whose batches differ; which rows and pages a sample gets is the host's.
CASES = [("cpu", setting) for setting in SETTINGS] + [
    pytest.param(*CUDA.values, setting, marks=CUDA.marks)
    for setting in ("all at once", "chunked prefill", "few pages, chunked")
]


@pytest.mark.parametrize(("device", "setting"), CASES, indirect=["device"])
def test_every_way_gives_the_same_samples(make_llm, prompts, alone, setting):
    llm = make_llm(**SETTINGS[setting])
    outputs = run(llm, prompts)
    again = run(llm, prompts)  # now with a warm prefix cache
    metrics = llm.metrics()
    assert (metrics["preemptions"] > 0) == ("few pages" in setting)
    assert metrics["kv_pages_free"] == metrics["kv_pages"]
    if setting == "all at once":
        assert metrics["prefix_tokens_reused"] > 0
    for result in (outputs, again):
        for expected, output in zip(alone, result, strict=True):
            for a, b in zip(expected, output.samples, strict=True):
                assert a.token_ids == b.token_ids
                assert torch.equal(a.soft.ids, b.soft.ids)
                assert torch.equal(a.soft.kind, b.soft.kind)
                assert torch.equal(a.soft.forced, b.soft.forced)
                torch.testing.assert_close(a.soft.gprime, b.soft.gprime, atol=2e-5, rtol=0)
                torch.testing.assert_close(a.logprobs, b.logprobs, atol=2e-5, rtol=0)


def test_recompute_reads_the_mixture_and_not_the_token(make_llm, prompts):
    """The test above would see it: with the token in place of the mixture, the rest differs."""
    expected = run(make_llm(max_batch_size=32), prompts)
    llm = make_llm(pages=9, max_batch_size=32)
    record = llm.runner.record

    def tokens_only(rows, index, embed, before):
        return embed[record.drawn.token[rows, index - before].long()]

    record.mixtures = tokens_only
    outputs = run(llm, prompts)
    assert any(
        a.token_ids != b.token_ids
        for x, y in zip(expected, outputs, strict=True)
        for a, b in zip(x.samples, y.samples, strict=True)
    )


def test_mixed_requests_share_a_batch(make_llm, prompts):
    """Soft, discrete, greedy and full-vocabulary samples in one batch equal separate runs."""
    settings = [
        (SamplingParams(max_tokens=12, ignore_eos=True, seed=1), SoftParams(top_k=7, tau=1.0)),
        (SamplingParams(max_tokens=9, ignore_eos=True, seed=2, top_p=0.9), False),
        (SamplingParams(max_tokens=15, ignore_eos=True, temperature=0.0), False),
        (SamplingParams(max_tokens=12, ignore_eos=True, seed=3, top_k=3, temperature=0.5), False),
    ]
    separate = [
        make_llm().generate(prompts[i], params, soft, progress=False)[0].samples[0]
        for i, (params, soft) in enumerate(settings)
    ]
    llm = make_llm()
    streams = [llm.stream(prompts[i], params, soft) for i, (params, soft) in enumerate(settings)]
    last = {}
    for i, stream in enumerate(streams):
        last[i] = next(stream)[1]  # the others advance in the same steps
    for i, stream in enumerate(streams):
        for _, sample in stream:
            last[i] = sample
    for i, expected in enumerate(separate):
        assert last[i].token_ids == expected.token_ids
        assert last[i].soft.ids.shape == expected.soft.ids.shape
        torch.testing.assert_close(last[i].soft.gprime, expected.soft.gprime, atol=2e-5, rtol=0)
