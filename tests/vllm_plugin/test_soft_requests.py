"""Soft requests of stock vLLM draw what our engine draws."""

import pytest
import torch
from records import SEED, asked, generate, records, replay_error, same

from softgrpo_engine import SamplingParams, SoftParams

# What of the draw, of the end of thinking and of the mixture each reaches.
CASES = {
    "default": {},
    "truly soft": {"tau": 1.0},
    "floor": {"tau": 1.0, "weight_floor": 0.3},
    "never ends": {"end_of_thinking": -1},
    "budget": {"max_soft_tokens": 5},
    "budget without an end": {"max_soft_tokens": 5, "end_of_thinking": -1},
    "least": {"min_soft_tokens": 9, "max_soft_tokens": 9},
    "official": {"noise_clip": (-1.5, 3.0), "eps": 1e-6},
    "hot": {"temperature": 1.7, "top_p": 0.8, "top_k": 8},
    "no noise": {"noise": "none"},
    "dirichlet": {"noise": "dirichlet", "tau": 1.0, "noise_scale": 10.0},
    "gaussian": {"noise": "gaussian", "tau": 1.0, "noise_scale": 0.1},
    "multiplex": {"noise": "multiplex", "tau": 1.0, "noise_scale": 3.0},
    "mixture of inputs": {"noise": "mixture_of_inputs", "tau": 1.0},
    "mean": {"noise": "mean", "tau": 1.0},
    "embedding": {"noise": "embedding", "tau": 1.0, "noise_scale": 0.1},
}


def drawn_by_ours(ours, prompts, soft, **sampling):
    sampling = {"temperature": 1.0, "top_k": 5, "max_tokens": 12} | sampling
    if soft is not False:
        soft = {"end_of_thinking": 2} | soft
        if soft["end_of_thinking"] == -1:
            soft["end_of_thinking"] = None
        soft = SoftParams(**soft)
    uids = [[i] for i in range(len(prompts))]
    groups = ours.generate_groups(prompts, SamplingParams(**sampling), soft, seed=SEED, uids=uids)
    return [group.samples[0] for group in groups]


@pytest.mark.parametrize("case", CASES)
def test_a_soft_request_draws_what_our_engine_draws(case, vllm, ours, prompts):
    soft = CASES[case]
    found = records(vllm, prompts, [asked(uid, **soft) for uid in range(len(prompts))])
    expected = drawn_by_ours(ours, prompts, soft)
    for record, sample in zip(found, expected, strict=True):
        # Rounding comes back with each mixture that is fed.
        assert same(record.soft, sample.soft, atol=1e-3)
        torch.testing.assert_close(record.logprobs, sample.logprobs, rtol=0, atol=1e-3)
    if "budget" in case:
        forced = [record.soft.forced.any() for record in found]
        assert any(forced) == (case == "budget")


def test_the_end_of_thinking_ends_it(vllm, ours, prompts):
    (free,) = records(vllm, prompts[:1], [asked(0, {"max_tokens": 12})])
    soft = {"end_of_thinking": int(free.soft.token[5])}
    (record,) = records(vllm, prompts[:1], [asked(0, {"max_tokens": 12}, **soft)])
    (sample,) = drawn_by_ours(ours, prompts[:1], soft)
    assert same(record.soft, sample.soft, atol=1e-3)
    last = record.soft.token.tolist().index(soft["end_of_thinking"])
    assert record.soft.kind.tolist() == [1] * last + [0] * (12 - last)


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_the_record_replays_through_transformers(tau, vllm, hf, prompts):
    found = records(vllm, prompts, [asked(i, tau=tau) for i in range(len(prompts))])
    for uid, (prompt, record) in enumerate(zip(prompts, found, strict=True)):
        assert replay_error(hf, prompt, record.soft, uid, tau=tau) < 1e-4


def test_in_bfloat16_candidates_have_logits_of_fp32(make, prompts, monkeypatch):
    """Also beside a plain request whose logits vLLM divides by its temperature."""
    from vllm import SamplingParams

    from softgrpo_vllm import sampler

    drawn, draw = [], sampler.soft_token_of_rows

    def kept(logits, rows, **options):
        drawn.append((draw(logits, rows, **options), options["hidden"], options["lm_head"]))
        return drawn[-1][0]

    llm = make(dtype="bfloat16")
    monkeypatch.setattr(sampler, "soft_token_of_rows", kept)
    plain = SamplingParams(temperature=0.5, max_tokens=4)
    generate(llm, prompts[:3], [asked(0), asked(1), plain])
    for step, hidden, lm_head in drawn:
        logits = hidden.float() @ lm_head.float().T
        listed = logits.gather(1, step.ids.long().clamp(min=0)).masked_fill(
            step.ids < 0, -torch.inf
        )
        known = (step.ids >= 0) & (step.kind == 1)[:, None]
        difference = (listed.log_softmax(-1) - step.logp)[known].abs().max()
        assert difference < 1e-5


@pytest.mark.parametrize("sampling", [{}, {"top_k": -1}, {"temperature": 0.0}, {"top_p": 0.7}])
def test_without_soft_tokens_it_draws_our_discrete_ones(sampling, vllm, ours, prompts):
    params = [asked(i, sampling, max_soft_tokens=0, kept_mass=1) for i in range(len(prompts))]
    found = records(vllm, prompts, params)
    expected = drawn_by_ours(ours, prompts, False, kept_mass=True, **sampling)
    for record, sample in zip(found, expected, strict=True):
        assert same(record.soft, sample.soft, atol=1e-4)
        torch.testing.assert_close(record.kept_mass, sample.kept_mass, rtol=0, atol=1e-5)


def test_plain_and_soft_requests_in_one_batch_are_as_alone(vllm, prompts):
    from vllm import SamplingParams as Params

    plain = [
        Params(temperature=0, max_tokens=12, logprobs=3),
        Params(temperature=0.8, seed=4, max_tokens=12, logprobs=2, presence_penalty=0.5),
    ]
    soft = [asked(0), asked(1, {"logprobs": 2}), asked(2, {"logprobs": None})]
    together = [*plain, *soft]
    batch = generate(vllm, prompts[:5], [plain[0], soft[0], plain[1], *soft[1:]])
    order = [0, 2, 1, 3, 4]
    for place, params in zip(order, together, strict=True):
        (alone,) = generate(vllm, [prompts[place]], [params])
        assert batch[place].token_ids == alone.token_ids
        if alone.logprobs is not None and params in plain:
            for one, other in zip(batch[place].logprobs, alone.logprobs, strict=True):
                assert one.keys() == other.keys()


def test_penalties_and_stops_reach_soft_requests(vllm, prompts):
    biased = asked(0, {"logit_bias": {7: 100.0}, "max_tokens": 6})
    (record,) = records(vllm, prompts[:1], [biased])
    assert record.soft.token.tolist() == [7] * 6
    ends = asked(0, {"stop_token_ids": [7], "logit_bias": {7: 100.0}})
    (output,) = generate(vllm, prompts[:1], [ends])
    assert output.token_ids == [7]


def test_children_of_one_request_have_noise_of_their_own(vllm, prompts):
    params = asked(0, {"n": 3, "seed": 11})
    del params.extra_args["soft_seed"], params.extra_args["soft_uid"]
    request = {"prompt_token_ids": prompts[0]}
    (first,), (again,) = (vllm.generate([request], params, use_tqdm=False) for _ in range(2))
    texts = [tuple(output.token_ids) for output in first.outputs]
    assert len(set(texts)) == 3
    assert texts == [tuple(output.token_ids) for output in again.outputs]


def test_candidates_beyond_those_that_there_are_have_other_ids(vllm, prompts):
    params = asked(0, {"logprobs": 20}, top_k=3)
    (output,) = generate(vllm, prompts[:1], [params])
    for position in output.logprobs:
        assert len(position) >= 20  # as dicts, no id twice but the token's


def test_a_record_without_all_candidates_is_none(vllm, prompts):
    """Its mixtures would be others than those that were fed."""
    with pytest.raises(ValueError, match=r"position has \d candidates, and 2 logprobs were asked"):
        records(vllm, prompts[:1], [asked(0, {"logprobs": 2}, tau=1.0)])


@pytest.mark.parametrize(
    ("changes", "extra", "message"),
    [
        ({}, {"soft_tua": 0.1}, "unknown soft setting 'soft_tua'"),
        ({}, {"soft": 2}, "soft=2 is not allowed: must be 0 or 1"),
        ({}, {"soft_tau": "warm"}, "soft_tau='warm' is not allowed: must be a number"),
        ({}, {"soft_tau": 0.0}, "tau=0.0 is not allowed"),
        ({}, {"soft_tau": 1e-42}, "gumbel_tau must be > 0, not denormal"),
        ({}, {"soft_top_k": 65}, "soft top_k=65 is not allowed"),
        ({}, {"soft_noise": "pink"}, "noise='pink' is not allowed"),
        ({}, {"soft_uid": 2**32}, "uid 4294967296 is not allowed"),
        ({}, {"soft_end_of_thinking": "</think>"}, "must be an integer, the token's id"),
        ({}, {"soft_clip_low": 1.0}, "soft_clip_high=None is not allowed"),
        ({}, {"soft_cold_stop_entropy": 0.1}, "vLLM knows no rules of entropy"),
        ({}, {"soft_min_tokens": 40}, "min_soft_tokens=40 is more than max_tokens=12"),
        ({"n": 2}, {}, "n=2 with soft_seed"),
        ({"logprobs": 65}, {}, "logprobs=65|Requested sample logprobs of 65"),
    ],
)
def test_bad_requests_are_refused_in_one_line(changes, extra, message, vllm, prompts):
    params = asked(0, changes)
    params.extra_args |= extra
    with pytest.raises(Exception, match=message) as raised:
        generate(vllm, prompts[:1], [params])
    assert type(raised.value).__name__ in ("ValueError", "VLLMValidationError")
    assert "\n" not in str(raised.value)


def test_keys_without_soft_are_refused(vllm, prompts):
    params = asked(0)
    del params.extra_args["soft"]
    with pytest.raises(Exception, match="is a setting of soft tokens: add soft=1"):
        generate(vllm, prompts[:1], [params])


def test_logits_that_are_not_finite_are_reported(vllm, prompts, monkeypatch):
    from softgrpo_vllm.sampler import SoftSampler

    processed = SoftSampler._processed

    def broken(self, logits, *batch):
        return processed(self, torch.full_like(logits, torch.nan), *batch)

    monkeypatch.setattr(SoftSampler, "_processed", broken)
    with pytest.raises(FloatingPointError, match="not finite"):
        records(vllm, prompts[:1], [asked(0)])
