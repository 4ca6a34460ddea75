"""What a decode step launches for its soft tokens: to mix its inputs, and to draw.

It was 52 launches: 25 for the mixtures and 27 behind the product with the LM head, 8 of them
kernels of ours.
"""

import pytest

from softgrpo_engine import SamplingParams, SoftParams

FREE = SamplingParams(max_tokens=12, ignore_eos=True, seed=7)
NUCLEUS = SamplingParams(max_tokens=12, ignore_eos=True, seed=7, top_p=0.9)
LISTED = SamplingParams(max_tokens=12, ignore_eos=True, seed=7, top_k=9)
SOFT = SoftParams(top_k=4, tau=0.7, end_of_thinking=None)
THINKING = SoftParams(top_k=4, tau=0.7, end_of_thinking="</think>")

LISTED_STEP = {"record_mixture_kernel": 1, "statistics_kernel": 1, "sample_kernel": 1}
STEP = {**LISTED_STEP, "collect_kernel": 1}
CASES = {
    "soft": (FREE, SOFT, LISTED_STEP),
    "of a few": (LISTED, THINKING, LISTED_STEP),
    # The phase may end at any position.
    "soft, then the vocabulary": (NUCLEUS, THINKING, STEP),
    "the vocabulary": (FREE, False, STEP),
}


@pytest.mark.parametrize("case", CASES)
def test_launches_of_sampling(make_llm_on, simulated_gpu, prompts, case, monkeypatch):
    """The step as it is, but for a decoder without layers."""
    params, soft, expected = CASES[case]
    llm = make_llm_on("cuda")
    llm.runner.graphs = None
    call = llm.submit(prompts[:2], params, soft)
    for _ in range(3):
        llm.step()
    monkeypatch.setattr(llm.runner.decoder, "forward", lambda embeds, *_: embeds)
    counted, decode = [], llm.runner._decode

    def counting(*arguments):
        with simulated_gpu.counting() as counts:
            drawn = decode(*arguments)
        counted.append(counts)
        return drawn

    monkeypatch.setattr(llm.runner, "_decode", counting)
    llm.step()
    (counts,) = counted
    assert counts.launches == {"aten::mm.out": 1, **expected}
    assert counts.waits.total() == 0, counts.table()
    llm.release(call)
