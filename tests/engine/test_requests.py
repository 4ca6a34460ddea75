"""What may be asked: prompts of every kind, and the refusals, each in one clear line."""

import json
from types import SimpleNamespace

import pytest

from softgrpo_engine import LLM, SamplingParams, SoftParams
from softgrpo_engine.execution.record import Drawn
from softgrpo_engine.requests.samples import finish_reason

VOCABULARY = 97


def only(outputs):
    assert len(outputs) == 1
    assert len(outputs[0].samples) == 1
    return outputs[0].samples[0]


class ChatTokenizer:
    """Writes a BOS itself and has a chat template that writes one too, as Llama 3's do."""

    bos_token = "<s>"

    def encode(self, text, add_special_tokens=True):
        ids = [0] if add_special_tokens else []
        while text:
            if text.startswith("<s>"):
                ids.append(0)
                text = text[3:]
            else:
                ids.append(3 + ord(text[0]) % 50)
                text = text[1:]
        return ids

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        assert add_generation_prompt
        assert not tokenize
        return "<s>" + "".join(message["content"] for message in messages) + ">"

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


def test_prompts_of_every_kind_have_one_bos(make_llm):
    llm = make_llm()
    llm.tokenizer = ChatTokenizer()
    params = SamplingParams(max_tokens=1)

    def ids(prompt):
        return [o.prompt_token_ids for o in llm.generate(prompt, params, progress=False)]

    text = ids("hey")
    assert text == ids("<s>hey") == ids(["hey"])
    assert text[0][0] == 0
    assert text[0].count(0) == 1
    chat = [{"role": "user", "content": "hey"}]
    assert ids(chat) == ids([chat]) == [text[0] + [3 + ord(">") % 50]]
    assert ids([5, 6]) == ids([[5, 6]]) == [[5, 6]]
    assert ids(["a", [5, 6], chat])[1] == [5, 6]


# Refusals


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "prompt 1 is empty"),
        ([3] * 300, {}, "prompt 1 has 300 tokens.*context is 256"),
        ([3] * 200, {"max_tokens": 60}, "prompt 1 has 200 tokens.*max_tokens=60.*context is 256"),
        ([3] * 100, {"max_tokens": 60}, "prompt 1 needs 10 KV pages.*there are 8.*kv_memory"),
        ([3, VOCABULARY], {}, "prompt 1 has token id 97.*vocabulary of 97"),
    ],
)
def test_requests_that_never_fit_are_refused_before_anything_runs(
    make_llm, prompt, params, message
):
    llm = make_llm(pages=8)
    with pytest.raises(ValueError, match=message):
        llm.generate([[3, 4], prompt], SamplingParams(**{"max_tokens": 8} | params), progress=False)
    assert llm.metrics()["prompt_tokens_computed"] == 0
    assert llm.metrics()["waiting"] == 0


@pytest.mark.parametrize(
    ("params", "soft", "message"),
    [
        # With min_tokens, such an id would be written outside the logits in the middle of a step.
        ({"stop_token_ids": (5, VOCABULARY)}, False, "stop_token_ids has 97.*vocabulary of 97"),
        ({"stop_token_ids": (-1,)}, False, "stop_token_ids has -1"),
        ({}, SoftParams(end_of_thinking=VOCABULARY), "end_of_thinking is 97"),
        ({}, SoftParams(end_of_thinking="aaab"), "'aaab' is 2 tokens"),
        ({"stop": "x"}, False, "stop strings need a tokenizer"),
        ({}, SoftParams(end_of_thinking="</think>"), "'</think>' needs a tokenizer"),
    ],
)
def test_settings_that_no_step_could_compute_are_refused(make_llm, params, soft, message):
    llm = make_llm()
    if "tokenizer" in message:
        llm.tokenizer = None
    with pytest.raises(ValueError, match=message):
        llm.generate([3, 4], SamplingParams(max_tokens=8, **params), soft, progress=False)
    assert not llm.scheduler.has_work


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "dtype='float8'.*bfloat16 or float32"),
        ({"max_model_len": 1024}, "max_model_len=1024 is more than the model's 512"),
        ({"max_batch_size": 0}, "max_batch_size=0"),
        ({"max_batch_tokens": 0}, "max_batch_tokens=0"),
        ({"max_model_len": -1}, "max_model_len=-1"),
        ({"kv_memory": 1e-9}, "kv_memory=1e-09 GiB does not hold one page"),
    ],
)
def test_bad_options_get_one_clear_line(make_llm, options, message):
    with pytest.raises(ValueError, match=message) as error:
        make_llm(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("uids", "message"),
    [([[2**32]], "uid 4294967296"), ([[-1]], "uid -1"), ([[1], [2]], "1 prompts and uids for 2")],
)
def test_uids_outside_the_counter_are_refused(make_llm, uids, message):
    with pytest.raises(ValueError, match=message):
        make_llm().generate_groups([[3]], SamplingParams(max_tokens=8), seed=0, uids=uids)


@pytest.mark.parametrize(
    ("soft", "stream", "bits"),
    [(False, -1, 32), (SoftParams(), 2**32, 32), (SoftParams(noise="dirichlet"), 2**16, 16)],
)
def test_a_stream_that_no_step_could_compute_ends_nobody_else(make_llm, soft, stream, bits):
    llm = make_llm()
    other = llm.submit([3, 4], SamplingParams(max_tokens=4))
    with pytest.raises(ValueError, match=f"stream {stream} is not allowed.*2.{bits}"):
        llm.submit([3, 4], SamplingParams(max_tokens=4), soft, stream=stream)
    while not other.is_done:
        llm.step()
        list(other.ended())


def test_a_record_that_found_no_memory_is_as_it_was(make_llm, monkeypatch):
    """A smaller table that is taken for a larger one would be written past its end."""
    llm = make_llm()
    (want,) = llm.generate([[3, 4]], SamplingParams(max_tokens=4, seed=1), progress=False)
    full = MemoryError("no memory")
    with monkeypatch.context() as patch:
        patch.setattr(Drawn, "empty", lambda *sizes: (_ for _ in ()).throw(full))
        with pytest.raises(MemoryError):
            llm.submit([3, 4], SamplingParams(max_tokens=100))
    assert llm.runner.record.capacity == llm.runner.record.drawn.token.shape[1] == 4
    (got,) = llm.generate([[3, 4]], SamplingParams(max_tokens=90, seed=1), progress=False)
    assert got.samples[0].token_ids[:4] == want.samples[0].token_ids


def test_soft_settings_of_the_model_directory_are_the_default(tmp_path, hf_model, tokenizer):
    hf_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert LLM(tmp_path, dtype="float32", max_batch_size=2, max_model_len=64).default_soft is None
    soft = SoftParams(top_k=3, tau=0.5, noise_clip=(-1.5, 3.0))
    (tmp_path / "softgrpo.json").write_text(json.dumps({"soft": soft.to_dict()}))
    llm = LLM(tmp_path, dtype="float32", max_batch_size=2, max_model_len=64)
    assert llm.default_soft == soft
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    assert only(llm.generate([5, 6], params, progress=False)).soft.kind.tolist() == [1] * 4
    assert only(llm.generate([5, 6], params, False, progress=False)).soft.kind.tolist() == [0] * 4
    (tmp_path / "softgrpo.json").write_text('{"soft": {"topk": 3}}')
    with pytest.raises(ValueError, match=r"softgrpo.json.*unknown soft setting 'topk'"):
        LLM(tmp_path, dtype="float32", max_batch_size=2, max_model_len=64)


def test_an_abort_leaves_the_same_prompt_of_another_caller_alone(make_llm, prompts):
    """Both callers have samples of the same uids."""
    llm = make_llm()
    params = SamplingParams(n=2, max_tokens=8, seed=1, ignore_eos=True)
    one, other = llm.stream(prompts[0], params), llm.stream(prompts[0], params)
    (_, sample), _ = next(one), next(other)
    llm.abort(sample)
    reasons = [[s.finish_reason for _, s in stream if s.finish_reason] for stream in (one, other)]
    assert reasons == [["abort", "length"], ["length", "length"]]


@pytest.mark.parametrize("seed", [None, 3])
def test_a_prompt_given_twice_is_one_with_twice_the_samples(make_llm, prompts, seed):
    params = {"max_tokens": 12, "seed": seed, "ignore_eos": True}
    pair = [prompts[0], prompts[1], prompts[0]]
    outputs = make_llm().generate(pair, SamplingParams(n=2, **params), progress=False)
    assert outputs[2].prompt_token_ids == prompts[0]
    twice = [sample.token_ids for i in (0, 2) for sample in outputs[i].samples]
    assert len({tuple(ids) for ids in twice}) == 4
    if seed is not None:
        (once,) = make_llm().generate(prompts[0], SamplingParams(n=4, **params), progress=False)
        assert twice == [sample.token_ids for sample in once.samples]


@pytest.mark.parametrize("min_tokens", [0, 3, 4, 24])
def test_a_stop_string_seen_before_min_tokens_does_not_end_the_sample(
    make_llm, prompts, tokenizer, min_tokens
):
    """Not later either, and the text is not cut there; one seen from then on does."""
    params = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}
    (free,) = make_llm().generate(prompts[0], SamplingParams(**params), progress=False)
    text, stop = free.samples[0].text, free.samples[0].text[1:4]  # in the first two tokens
    settings = SamplingParams(**params, stop=stop, min_tokens=min_tokens)
    (output,) = make_llm().generate(prompts[0], settings, progress=False)
    sample = output.samples[0]
    # Tokens are of two letters. The string is there twice: from the second to the fourth letter,
    # and from the fourth to the sixth.
    assert [i for i in range(len(text)) if text.startswith(stop, i)] == [1, 3]
    if min_tokens <= 3:
        assert sample.finish_reason == "stop"
        assert len(sample.token_ids) == max(2, min_tokens)
        assert sample.text == text[: 1 if min_tokens == 0 else 3]
    else:
        assert sample.finish_reason == "length"
        assert sample.text == text


def test_a_stop_string_may_end_in_a_character_of_several_tokens():
    """The text of all tokens but the newest has a replacement character there."""
    tokenizer = SimpleNamespace(decode=lambda ids, **_: bytes(ids).decode(errors="replace"))
    sequence = SimpleNamespace(
        params=SamplingParams(stop="né"), min_tokens=0, end_ids=(), tokens=[]
    )
    hits = []
    for token in "née".encode():
        sequence.tokens.append(token)
        hits.append(finish_reason(sequence, tokenizer))
    assert hits == [None, None, "stop", None]


def test_groups_are_taken_from_a_queue_when_there_is_room(make_llm, prompts):
    llm, taken, ended = make_llm(max_batch_size=4, max_batch_tokens=48), [], []
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    uids = [[2 * i, 2 * i + 1] for i in range(len(prompts))]

    def groups():
        for group in zip(prompts, uids, strict=True):
            assert len(llm.scheduler.active) < 4
            assert len(taken) - len(ended) <= 3
            taken.append(group)
            yield group

    for index, output in llm.iter_groups(groups(), params, SoftParams(), seed=5):
        ended.append(index)
        assert [sample.uid for sample in output.samples] == uids[index]
        expected = llm_alone(make_llm, prompts[index], params, uids[index])
        assert [s.token_ids for s in output.samples] == expected
    assert sorted(ended) == list(range(len(prompts)))
    assert llm.metrics()["kv_pages_free"] == llm.metrics()["kv_pages"]


def llm_alone(make_llm, prompt, params, uids):
    (output,) = make_llm().generate_groups([prompt], params, SoftParams(), seed=5, uids=[uids])
    return [sample.token_ids for sample in output.samples]


def test_what_is_raised_between_steps_ends_the_samples(make_llm, prompts):
    llm, steps = make_llm(), [1, 2, 3]
    groups = [(prompts[0], [0, 1]), (prompts[1], [2, 3])]
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    with pytest.raises(IndexError):
        list(llm.iter_groups(groups, params, seed=0, between_steps=steps.pop))
    assert not llm.scheduler.has_work
