"""Log-probabilities of prompts: those of transformers, however the prompt was cut and shared."""

import pytest
import torch

from softgrpo_engine import SamplingParams

PARAMS = SamplingParams(max_tokens=3, ignore_eos=True, seed=1, prompt_logprobs=4)


def reference(hf_model, prompt):
    """log p [P - 1, V] of what follows each token, fp64."""
    with torch.no_grad():
        logits = hf_model(torch.tensor([prompt])).logits[0, :-1].double()
    return torch.log_softmax(logits, dim=-1)


def check(hf_model, output):
    prompt, got = output.prompt_token_ids, output.prompt_logprobs
    want = reference(hf_model, prompt)
    assert got.logprobs.shape == (len(prompt) - 1,)
    assert got.ids.shape == got.top.shape == (len(prompt) - 1, 4)
    following = torch.tensor(prompt[1:])[:, None]
    torch.testing.assert_close(
        got.logprobs.double(), want.gather(1, following)[:, 0], atol=2e-5, rtol=0
    )
    top = want.topk(4, dim=-1)
    torch.testing.assert_close(got.top.double(), top.values, atol=2e-5, rtol=0)
    assert torch.equal(got.ids.long(), top.indices)


# 7: cut into chunks; 256: several prompts in a step.
@pytest.mark.parametrize("max_batch_tokens", [7, 256])
def test_they_are_those_of_transformers(make_llm, hf_model, prompts, max_batch_tokens):
    llm = make_llm(max_batch_tokens=max_batch_tokens)
    for output in llm.generate(prompts, PARAMS, progress=False):
        check(hf_model, output)


def test_a_cached_prompt_is_computed_whole_and_a_group_computes_it_once(
    make_llm, hf_model, prompts
):
    llm = make_llm()
    plain = SamplingParams(max_tokens=3, ignore_eos=True, seed=1, n=3)
    want = llm.generate(prompts[3], plain, progress=False)[0]
    assert want.prompt_logprobs is None
    before = llm.metrics()["prompt_tokens_computed"]
    scored = SamplingParams(max_tokens=3, ignore_eos=True, seed=1, n=3, prompt_logprobs=4)
    output = llm.generate(prompts[3], scored, progress=False)[0]
    check(hf_model, output)
    assert llm.metrics()["prompt_tokens_computed"] - before == len(prompts[3])
    assert [s.token_ids for s in output.samples] == [s.token_ids for s in want.samples]


def test_a_preempted_prompt_is_scored_once(make_llm, hf_model, prompts):
    llm = make_llm(pages=9)
    params = SamplingParams(max_tokens=60, ignore_eos=True, seed=1, prompt_logprobs=4)
    outputs = llm.generate([prompts[3], prompts[5]], params, progress=False)
    assert llm.metrics()["preemptions"] > 0
    for output in outputs:
        check(hf_model, output)
