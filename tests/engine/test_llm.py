"""LLM: greedy against transformers, phases, limits, groups, weight updates."""

import time
from dataclasses import replace

import pytest
import torch

from softgrpo_engine import SamplingParams, SoftParams
from softgrpo_engine.model.weights import load_weights
from softgrpo_kernels import gumbel_noise

EOS, THINK_END, VOCABULARY = 1, 2, 97
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


def only(outputs):
    assert len(outputs) == 1
    assert len(outputs[0].samples) == 1
    return outputs[0].samples[0]


def test_greedy_equals_transformers(make_llm, hf_model, prompts):
    outputs = make_llm().generate(prompts, GREEDY, soft=False, progress=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = hf_model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=24, min_new_tokens=24,
            eos_token_id=None,
        )[0, len(prompt) :]  # fmt: skip
        sample = output.samples[0]
        assert sample.token_ids == expected.tolist()
        assert output.prompt_token_ids == prompt
        logits = hf_model(torch.tensor([prompt + sample.token_ids])).logits[0, len(prompt) - 1 : -1]
        logp = logits.log_softmax(-1).gather(1, expected[:, None])[:, 0].detach()
        torch.testing.assert_close(sample.logprobs, logp, atol=1e-5, rtol=1e-5)


def test_greedy_stops_at_eos(make_llm, prompts):
    free = only(make_llm().generate(prompts[0], GREEDY, progress=False)).token_ids
    end = free[5]
    params = SamplingParams(temperature=0.0, max_tokens=24, stop_token_ids=(end,), ignore_eos=True)
    sample = only(make_llm().generate(prompts[0], params, progress=False))
    assert sample.token_ids == free[: free.index(end) + 1]
    assert sample.finish_reason == "stop"


def test_soft_record_is_what_the_model_says(make_llm, hf_model, prompts):
    """Teacher forcing in transformers on mixtures rebuilt from (ids, g') gives log p back."""
    soft = SoftParams(top_k=4, top_p=1.0, tau=0.7, end_of_thinking=None)
    params = SamplingParams(max_tokens=20, seed=3, ignore_eos=True)
    sample = only(make_llm().generate(prompts[2], params, soft, progress=False))
    record = sample.soft
    assert record.ids.shape == record.gprime.shape == (20, 4)
    assert bool((record.kind == 1).all())
    assert record.token.tolist() == sample.token_ids == record.ids[:, 0].tolist()
    weights = torch.softmax(record.gprime / 0.7, -1)
    assert float(weights[:, 0].min()) < 0.9  # truly mixed
    table = hf_model.get_input_embeddings().weight
    mixed = (weights[..., None] * table[record.ids.long()]).sum(1)
    embeds = torch.cat([table[torch.tensor(prompts[2])], mixed])[None]
    logits = hf_model(inputs_embeds=embeds).logits[0, len(prompts[2]) - 1 : -1].detach()
    logp = logits.gather(1, record.ids.long()).log_softmax(-1)
    position = len(prompts[2]) + torch.arange(20)
    noise = gumbel_noise(record.ids, 3, position, sample.uid)
    torch.testing.assert_close(record.gprime - noise, logp, atol=2e-5, rtol=0)
    torch.testing.assert_close(sample.logprobs, logp[:, 0], atol=2e-5, rtol=0)
    assert torch.equal(torch.sort(logits.topk(4).indices).values, record.ids.long().sort().values)


def test_logprobs_of_discrete_positions_are_those_of_the_draw(make_llm, hf_model, prompts):
    """Temperature, the kept candidates and their renormalisation, as transformers' logits say."""
    params = SamplingParams(max_tokens=20, seed=3, ignore_eos=True, temperature=0.6, top_k=4)
    llm = make_llm()
    sample = only(llm.generate(prompts[2], params, soft=False, progress=False))
    logits = hf_model(torch.tensor([prompts[2] + sample.token_ids])).logits[0]
    kept = (logits[len(prompts[2]) - 1 : -1].detach() / 0.6).topk(4)
    tokens = torch.tensor(sample.token_ids)
    assert bool((kept.indices == tokens[:, None]).any(-1).all())
    expected = kept.values.log_softmax(-1)[kept.indices == tokens[:, None]]
    torch.testing.assert_close(sample.logprobs, expected, atol=2e-5, rtol=0)
    assert float(expected.min()) < -1  # not always the best one
    assert torch.equal(sample.soft.ids.sort().values.int(), kept.indices.sort().values.int())
    # Over the vocabulary, for those who ask.
    assert sample.kept_mass is None
    params = replace(params, kept_mass=True)
    asked = only(llm.generate(prompts[2], params, soft=False, progress=False))
    torch.testing.assert_close(asked.logprobs, sample.logprobs, atol=2e-5, rtol=0)
    full = (logits[len(prompts[2]) - 1 : -1].detach() / 0.6).log_softmax(-1)
    expected = full.gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(asked.logprobs + asked.kept_mass.log(), expected, atol=2e-5, rtol=0)


def test_a_group_computes_its_prompt_once(make_llm, prompts):
    llm = make_llm()
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    outputs = llm.generate_groups(
        prompts, params, SoftParams(), seed=1, uids=[[10 * i, 10 * i + 1] for i in range(6)]
    )
    assert llm.metrics()["prompt_tokens_computed"] == sum(map(len, prompts))
    assert [[s.uid for s in o.samples] for o in outputs] == [[10 * i, 10 * i + 1] for i in range(6)]
    for output in outputs:
        assert output.samples[0].token_ids != output.samples[1].token_ids
    assert llm.metrics()["generated_tokens"] == 6 * 2 * 6
    # The same prompt again: all but the unfilled page comes from the cache.
    llm.generate_groups(prompts[3:4], params, seed=1, uids=[[5]])
    assert llm.metrics()["prompt_tokens_computed"] == sum(map(len, prompts)) + 40 % 16


def test_noise_keys_name_the_sample(make_llm, prompts):
    llm, params = make_llm(), SamplingParams(max_tokens=12, ignore_eos=True)

    def draw(**keys):
        keys = {"seed": 1, "uids": [[7]], "stream": 0} | keys
        return only(llm.generate_groups(prompts[:1], params, SoftParams(), **keys)).token_ids

    assert draw() == draw()
    others = [draw(seed=2), draw(uids=[[8]]), draw(stream=1), draw(seed=2**64 - 1)]
    assert all(tokens != draw() for tokens in others)
    same = only(llm.generate(prompts[0], SamplingParams(seed=4, max_tokens=12), progress=False))
    again = only(llm.generate(prompts[0], SamplingParams(seed=4, max_tokens=12), progress=False))
    assert same.token_ids == again.token_ids
    fresh = [
        only(llm.generate(prompts[0], SamplingParams(max_tokens=12), progress=False)).token_ids
        for _ in range(2)
    ]
    assert fresh[0] != fresh[1]


def test_update_weights_equals_a_fresh_engine(make_llm, hf_model, prompts):
    params = SamplingParams(max_tokens=10, n=2, seed=0, ignore_eos=True)
    state = {k: v.clone() for k, v in hf_model.state_dict().items() if k != "lm_head.weight"}
    generator = torch.Generator().manual_seed(9)
    state = {k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in state.items()}
    llm = make_llm()
    before = llm.generate(prompts, params, SoftParams(), progress=False)
    llm.update_weights(state.items(), version=3)
    after = llm.generate(prompts, params, SoftParams(), progress=False)
    fresh_llm = make_llm()
    load_weights(fresh_llm.runner.decoder, iter(state.items()))
    fresh_llm.runner.decoder.pack()
    fresh = fresh_llm.generate(prompts, params, SoftParams(), progress=False)
    assert llm.metrics()["weight_version"] == 3
    assert [o.samples[0].token_ids for o in before] != [o.samples[0].token_ids for o in after]
    for mine, theirs in zip(after, fresh, strict=True):
        for a, b in zip(mine.samples, theirs.samples, strict=True):
            assert a.token_ids == b.token_ids
            assert torch.equal(a.soft.gprime, b.soft.gprime)


# Phases


def soft_until(llm, prompt, **soft):
    params = SamplingParams(max_tokens=16, seed=2, ignore_eos=True, top_k=3)
    return only(llm.generate(prompt, params, SoftParams(**soft), progress=False))


def test_end_of_thinking_makes_the_rest_discrete(make_llm, prompts):
    llm = make_llm()
    free = soft_until(llm, prompts[0], end_of_thinking=None)
    assert free.soft.kind.tolist() == [1] * 16
    end = free.token_ids[6]
    at = free.token_ids.index(end)
    sample = soft_until(llm, prompts[0], end_of_thinking=end)
    assert sample.token_ids[: at + 1] == free.token_ids[: at + 1]
    assert sample.soft.kind.tolist() == [1] * at + [0] * (16 - at)
    assert not sample.soft.forced.any()
    # The position keeps the candidates it was chosen from; its input is the token alone.
    assert torch.equal(sample.soft.gprime[at], free.soft.gprime[at])
    # Discrete positions are drawn with the discrete parameters: 3 candidates of the 5 slots.
    assert ((sample.soft.ids[at + 1 :] >= 0).sum(-1) == 3).all()


def test_soft_budget_forces_the_end_of_thinking(make_llm, prompts):
    llm = make_llm()
    sample = soft_until(llm, prompts[0], end_of_thinking="</think>", max_soft_tokens=5)
    assert sample.token_ids[5] == THINK_END
    assert sample.soft.kind.tolist() == [1] * 5 + [0] * 11
    assert sample.soft.forced.tolist() == [False] * 5 + [True] + [False] * 10
    assert sample.soft.ids[5].tolist() == [THINK_END, -1, -1, -1, -1]
    assert sample.logprobs[5] == 0.0
    # What follows is what follows </think> in any other sequence.
    free = soft_until(llm, prompts[0], end_of_thinking=None)
    assert sample.token_ids[:5] == free.token_ids[:5]
    assert sample.token_ids[6:] != free.token_ids[6:]


def test_soft_budget_without_such_a_token_only_switches(make_llm, prompts):
    sample = soft_until(make_llm(), prompts[0], end_of_thinking=None, max_soft_tokens=5)
    assert sample.soft.kind.tolist() == [1] * 5 + [0] * 11
    assert not sample.soft.forced.any()


@pytest.mark.parametrize("end_of_thinking", ["</think>", None])
def test_a_budget_of_exactly_so_many_soft_tokens(make_llm, prompts, end_of_thinking):
    """No end may be drawn before, whatever the model prefers; then thinking ends at once."""
    free = soft_until(make_llm(), prompts[0], end_of_thinking=None)
    soft = SoftParams(
        top_k=5,
        tau=0.7,
        end_of_thinking=end_of_thinking,
        max_soft_tokens=5,
        min_soft_tokens=5,
    )
    ends = tuple(free.token_ids[:3])
    params = SamplingParams(n=8, max_tokens=9, seed=2, stop_token_ids=ends, stop=("a", "b"))
    samples = make_llm().generate(prompts[0], params, soft, progress=False)[0].samples
    for sample in samples:
        assert sample.soft.kind.tolist()[:5] == [1] * 5
        assert not sample.soft.kind[5:].any()
        assert not set(sample.soft.ids[:5].flatten().tolist()) & {*ends, THINK_END, EOS}
        # A stop string may end the sample with the last of them.
        if len(sample.token_ids) > 5:
            assert bool(sample.soft.forced[5]) == (end_of_thinking is not None)
    lengths = {len(sample.token_ids) for sample in samples}
    assert min(lengths) <= 6  # the ends are free again
    with pytest.raises(ValueError, match="min_soft_tokens=5 is more than max_tokens=4"):
        make_llm().generate(prompts[0], SamplingParams(max_tokens=4), soft)
    with pytest.raises(ValueError, match=r"min_soft_tokens=5.*<= max_soft_tokens \(4\)"):
        SoftParams(min_soft_tokens=5, max_soft_tokens=4)


def test_auto_finds_the_token_and_other_words_are_refused(make_llm, prompts):
    sample = soft_until(make_llm(), prompts[0], end_of_thinking="auto", max_soft_tokens=3)
    assert sample.token_ids[3] == THINK_END
    with pytest.raises(ValueError, match="'aaab' is 2 tokens"):
        soft_until(make_llm(), prompts[0], end_of_thinking="aaab")
    with pytest.raises(ValueError, match="vocabulary"):
        soft_until(make_llm(), prompts[0], end_of_thinking=VOCABULARY)


def test_eos_ends_a_soft_sample_as_a_discrete_position(make_llm, prompts):
    llm = make_llm()
    free = soft_until(llm, prompts[0], end_of_thinking=None)
    params = SamplingParams(
        max_tokens=16, seed=2, ignore_eos=True, top_k=3, stop_token_ids=(free.token_ids[4],)
    )
    soft = SoftParams(end_of_thinking=None)
    sample = only(llm.generate(prompts[0], params, soft, progress=False))
    at = free.token_ids.index(free.token_ids[4])
    assert sample.token_ids == free.token_ids[: at + 1]
    assert sample.finish_reason == "stop"
    assert sample.soft.kind.tolist() == [1] * at + [0]


def test_noise_none_is_deterministic_soft_thinking(make_llm, prompts):
    llm, params = make_llm(), SamplingParams(max_tokens=8, ignore_eos=True, n=2)
    samples = llm.generate(prompts[0], params, SoftParams(noise="none"), progress=False)[0].samples
    assert samples[0].token_ids == samples[1].token_ids
    assert torch.equal(samples[0].soft.gprime, samples[1].soft.gprime)
    live = samples[0].soft.ids >= 0
    total = torch.where(live, samples[0].soft.gprime.exp(), 0.0).sum(-1)
    torch.testing.assert_close(total, torch.ones(8))  # g' is log p itself


def test_official_settings_keep_every_slot(make_llm, prompts):
    soft = SoftParams(noise_clip=(-1.5, 3.0), eps=1e-6, top_p=0.5, end_of_thinking=None)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    sample = only(make_llm().generate(prompts[0], params, soft, progress=False))
    assert bool((sample.soft.ids >= 0).all())


# Ends and limits


def test_stop_strings_end_and_are_cut(make_llm, tokenizer, prompts):
    free = only(make_llm().generate(prompts[0], GREEDY, progress=False))
    text = tokenizer.decode(free.token_ids)
    stop = text[9:12]  # reaches over three tokens of two letters
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, stop=("zzzz", stop))
    sample = only(make_llm().generate(prompts[0], params, progress=False))
    assert sample.finish_reason == "stop"
    assert sample.text == text[: text.index(stop)]
    end = text.index(stop) + len(stop)
    assert len(sample.token_ids) == -(-end // 2)


def test_min_tokens_hold_the_end_back(make_llm, prompts):
    free = only(make_llm().generate(prompts[0], GREEDY, progress=False)).token_ids
    params = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, "stop_token_ids": free[:3]}
    assert len(only(make_llm().generate(prompts[0], SamplingParams(**params))).token_ids) == 1
    sample = only(make_llm().generate(prompts[0], SamplingParams(**params, min_tokens=6)))
    assert len(sample.token_ids) >= 6
    assert not set(sample.token_ids[:6]) & set(free[:3])


def test_max_tokens_end_by_length(make_llm, prompts):
    sample = only(make_llm().generate(prompts[0], SamplingParams(max_tokens=3, ignore_eos=True)))
    assert len(sample.token_ids) == len(sample.logprobs) == len(sample.soft.kind) == 3
    assert sample.finish_reason == "length"


def test_stream_gives_every_token_and_the_same_sample(make_llm, prompts):
    llm = make_llm()
    params = SamplingParams(max_tokens=6, seed=1, ignore_eos=True)
    soft = SoftParams()
    lengths = {0: [], 1: []}
    last = {}
    for index, sample in llm.stream(prompts[:2], params, soft):
        lengths[index].append(len(sample.token_ids))
        last[index] = sample
    assert lengths == {0: [1, 2, 3, 4, 5, 6], 1: [1, 2, 3, 4, 5, 6]}
    for i, output in enumerate(llm.generate(prompts[:2], params, soft, progress=False)):
        assert last[i].token_ids == output.samples[0].token_ids
        assert last[i].finish_reason == "length"


def test_abort_gives_back_what_there_is_and_disturbs_nobody(make_llm, prompts):
    params = SamplingParams(max_tokens=10, seed=1, n=3, ignore_eos=True)
    expected = make_llm().generate(prompts[3], params, SoftParams(), progress=False)[0].samples
    llm = make_llm(max_batch_size=2)  # the third sample is still waiting
    done = {}
    for _, sample in llm.stream(prompts[3], params, SoftParams()):
        if sample.finish_reason:
            done[sample.uid] = sample
        if sample.uid == expected[0].uid and len(sample.token_ids) == 4:
            llm.abort(sample)
    assert {uid: s.finish_reason for uid, s in done.items()} == {
        expected[0].uid: "abort",
        expected[1].uid: "length",
        expected[2].uid: "length",
    }
    assert done[expected[0].uid].token_ids == expected[0].token_ids[:4]
    assert done[expected[1].uid].token_ids == expected[1].token_ids
    assert done[expected[2].uid].token_ids == expected[2].token_ids
    assert llm.metrics()["kv_pages_free"] == llm.metrics()["kv_pages"]


def test_a_stream_left_early_leaves_nothing_behind(make_llm, prompts):
    llm = make_llm()
    for _ in llm.stream(prompts, SamplingParams(max_tokens=10, ignore_eos=True)):
        break
    metrics = llm.metrics()
    assert metrics["running"] == metrics["waiting"] == 0
    assert metrics["kv_pages_free"] == metrics["kv_pages"]


def test_an_error_reaches_streams_that_are_read_in_turns(make_llm, prompts):
    """The step of one stream fails: the other one does not simply end."""
    llm = make_llm()
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    one, other = llm.stream(prompts[0], params), llm.stream(prompts[1], params)
    next(one), next(other), next(one)  # both have been given all there is
    run, llm.runner.run = llm.runner.run, lambda plan: 1 / 0
    with pytest.raises(ZeroDivisionError):
        next(one)
    llm.runner.run = run
    with pytest.raises(ZeroDivisionError):
        next(other)
    assert llm.generate(prompts[0], params, progress=False)[0].samples[0].finish_reason == "length"


def test_news_are_of_the_moment_at_which_they_were_asked_for(make_llm, prompts):
    """Whoever takes the first item may step until the others have ended and left their rows."""
    llm = make_llm()
    call = llm.submit(prompts[:2], SamplingParams(max_tokens=12, ignore_eos=True, seed=3), False)
    for _ in range(3):
        llm.step()
    first, other = call.sequences
    llm.abort(first)
    news, length = call.news(), len(other.tokens)
    assert next(news)[1].finish_reason == "abort"
    while llm.scheduler.has_work:
        llm.step()
    _, sample = next(news)
    assert len(sample.token_ids) == length
    assert sample.soft.token.tolist() == sample.token_ids
    ((_, sample),) = call.news()
    assert sample.soft.token.tolist() == sample.token_ids == other.tokens
    llm.release(call)


def test_metrics_tell_the_load_and_the_speed(make_llm, prompts):
    llm = make_llm(max_batch_size=2)
    idle = llm.metrics()
    assert idle["tokens_per_second"] == idle["tokens_per_second_recent"] == idle["kv_use"] == 0
    params = SamplingParams(max_tokens=5, n=3, ignore_eos=True, seed=1)
    stream = llm.stream(prompts[3], params)  # 40 tokens: 3 pages
    next(stream)
    busy = llm.metrics()
    assert (busy["running"], busy["waiting"], busy["generated_tokens"]) == (2, 1, 2)
    assert busy["kv_use"] == 4 / busy["kv_pages"]  # two pages shared, a third of each
    seconds = 0.0
    while llm.metrics()["generated_tokens"] < 15:
        start = time.perf_counter()
        llm.step()
        seconds += time.perf_counter() - start
    metrics = llm.metrics()
    assert metrics["tokens_per_second"] == pytest.approx(15 / seconds, rel=0.9)
    assert metrics["tokens_per_second_recent"] == pytest.approx(metrics["tokens_per_second"])
    # The second and the third sample found the 40 tokens that the first had computed; the third
    # through its two full pages.
    assert metrics["prefix_tokens_reused"] == 40 + 32
    assert metrics["prefix_hit_rate"] == 72 / 120
