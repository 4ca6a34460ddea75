"""What clients ask for and get, row by row of the table in docs/serving.md."""

import json

import pytest
import torch

from softgrpo_engine import SamplingParams, SoftParams

pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "aaabacad"}]
PROMPT = "aaabacad"
BODY = {"messages": MESSAGES, "max_tokens": 9, "seed": 3}
PARAMS = SamplingParams(max_tokens=9, seed=3)


def sample_of(llm, prompt=PROMPT, params=PARAMS, soft=None, **names):
    call = llm.submit(prompt, params, soft or False, **names)
    while call.num_unfinished:
        llm.step()
    ((_, output),) = call.ended()
    llm.release(call)
    return output.samples[0]


def record_of(choice):
    """The record of an answer, in tensors without unused slots."""
    rows = zip(choice["soft"]["ids"], choice["soft"]["gprime"], strict=True)
    return [(ids, torch.tensor(gprime).tolist()) for ids, gprime in rows]


def record(sample):
    rows = zip(sample.soft.ids.tolist(), sample.soft.gprime.tolist(), strict=True)
    used = [[pair for pair in zip(*row, strict=True) if pair[0] >= 0] for row in rows]
    return [([i for i, _ in row], [g for _, g in row]) for row in used]


def test_models_health_and_metrics(served):
    _, _, models = served.request("GET", "/v1/models")
    assert b'"object":"list"' in models
    assert b'"id":"tiny"' in models
    assert served.request("GET", "/health")[0] == 200
    before = served.metric("softgrpo_generated_tokens_total")
    served.post(CHAT, BODY)
    assert served.metric("softgrpo_generated_tokens_total") == before + 9
    assert served.metric('softgrpo_requests_total{route="/v1/chat/completions",status="200"}') >= 1


def test_one_model_by_its_name(served, make_llm, serve):
    listed = json.loads(served.request("GET", "/v1/models")[2])["data"][0]
    assert json.loads(served.request("GET", "/v1/models/tiny")[2]) == listed
    assert served.metric('softgrpo_requests_total{route="/v1/models/tiny",status="200"}') == 1
    status, error = served.error("/v1/models/other", None, method="GET")
    assert (status, error["message"]) == (404, "there is no model 'other': this is 'tiny'")
    assert served.metric('softgrpo_requests_total{route="other",status="404"}') >= 1
    with serve(make_llm(), name="organisation/model", api_key="secret") as server:
        path = "/v1/models/organisation/model"
        assert server.request("GET", path)[0] == 401
        assert server.request("GET", path, Authorization="Bearer secret")[0] == 200


def test_a_chat_is_what_the_engine_draws_and_the_record_comes_with_it(served, llm):
    answer = served.post(CHAT, {**BODY, "return_soft": True})
    want = sample_of(llm, soft=SoftParams())
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": want.text}
    assert choice["finish_reason"] == "length"
    assert record_of(choice) == record(want)
    assert choice["soft"]["kind"] == want.soft.kind.tolist() == [1] * 9
    assert choice["soft"]["forced"] == [False] * 9
    assert answer["object"] == "chat.completion"
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 9, "total_tokens": 13}


def test_a_stream_says_the_same_piece_by_piece(served):
    body = {**BODY, "return_soft": True, "logprobs": True, "top_logprobs": 2}
    (whole,) = served.post(CHAT, body)["choices"]
    *events, usage = served.events(CHAT, {**body, "stream_options": {"include_usage": True}})
    pieces = [choice for event in events for choice in event["choices"]]
    assert len(pieces) > 3
    assert "role" in pieces[0]["delta"]
    assert not any("role" in piece["delta"] for piece in pieces[1:])
    text = "".join(piece["delta"].get("content", "") for piece in pieces)
    assert text == whole["message"]["content"]
    for name in ("ids", "gprime", "kind", "forced"):
        assert [row for piece in pieces for row in piece["soft"][name]] == whole["soft"][name]
    entries = [entry for piece in pieces for entry in piece["logprobs"]["content"]]
    assert entries == whole["logprobs"]["content"]
    assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 9)
    assert len({event["id"] for event in events}) == 1


def test_n_samples_and_their_names(served, llm):
    answer = served.post(CHAT, {**BODY, "n": 3})
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    params = SamplingParams(max_tokens=9, seed=3, n=3)
    want = llm.generate([PROMPT], params, SoftParams(), progress=False)[0].samples
    assert texts == [sample.text for sample in want]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    events = served.events(CHAT, {**BODY, "n": 3})
    streamed = ["", "", ""]
    for choice in (choice for event in events for choice in event["choices"]):
        streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == texts


def test_the_same_seed_gives_the_same_and_without_one_answers_differ(served):
    texts = [served.post(CHAT, BODY)["choices"][0]["message"]["content"] for _ in range(2)]
    assert texts[0] == texts[1]
    free = {"messages": MESSAGES, "max_tokens": 30}
    texts = [served.post(CHAT, free)["choices"][0]["message"]["content"] for _ in range(2)]
    assert texts[0] != texts[1]
    served.post(CHAT, {**BODY, "seed": -1})


@pytest.mark.parametrize("is_streamed", [False, True])
def test_stop_strings_are_cut_and_never_begun(served, is_streamed):
    body = {"prompt": PROMPT, "max_tokens": 30, "seed": 3, "soft": 0}
    text = served.post(COMPLETIONS, body)["choices"][0]["text"]
    stop = text[7:11]  # across tokens of two letters
    want = text[: text.index(stop)]
    if is_streamed:
        choices = [
            event["choices"][0] for event in served.events(COMPLETIONS, {**body, "stop": stop})
        ]
        got = "".join(choice["text"] for choice in choices)
    else:
        choices = served.post(COMPLETIONS, {**body, "stop": [stop, "zz"]})["choices"]
        got = choices[0]["text"]
    assert got == want
    assert choices[-1]["finish_reason"] == "stop"


def test_prompts_are_texts_token_ids_or_lists_of_them(served, llm):
    ids = llm.tokenizer.encode(PROMPT)
    rest = {"max_tokens": 5, "seed": 1}
    one = served.post(COMPLETIONS, {"prompt": ids, **rest})["choices"]
    assert one == served.post(COMPLETIONS, {"prompt": PROMPT, **rest})["choices"]
    two = served.post(COMPLETIONS, {"prompt": [ids, [5, 6, 7]], **rest})["choices"]
    assert [choice["index"] for choice in two] == [0, 1]
    assert two[0]["text"] == one[0]["text"]
    assert len(served.post(COMPLETIONS, {"prompt": PROMPT})["choices"][0]["text"]) <= 32


@pytest.mark.parametrize("seed", [1, None])
def test_a_prompt_given_twice_is_one_with_twice_the_samples(served, seed):
    ask = {"max_tokens": 20, "seed": seed}
    twice = served.post(COMPLETIONS, {"prompt": [PROMPT, PROMPT], **ask})["choices"]
    texts = [choice["text"] for choice in twice]
    assert texts[0] != texts[1]
    if seed:
        one = served.post(COMPLETIONS, {"prompt": PROMPT, "n": 2, **ask})["choices"]
        assert texts == [choice["text"] for choice in one]
    events = served.events(COMPLETIONS, {"prompt": [PROMPT, PROMPT], **ask})
    assert {choice["index"] for event in events for choice in event["choices"]} == {0, 1}


def test_a_developer_is_the_system(make_llm, serve):
    llm = make_llm()
    llm.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}aa"
    )
    messages = [{"role": "developer", "content": "ab"}, *MESSAGES]
    with serve(llm) as server:
        answer = server.post(CHAT, {**BODY, "messages": messages})
        assert answer["usage"]["prompt_tokens"] == 2


def test_soft_keys_at_the_top_or_as_extra_arguments_of_vllm(served, llm):
    keys = {"soft_tau": 1.0, "soft_top_k": 3, "soft_top_p": 1.0, "soft_seed": 9, "soft_uid": 4}
    keys |= {"soft_stream": 1, "soft_max_tokens": 4, "soft_weight_floor": 0.1}
    soft = SoftParams(tau=1.0, top_k=3, top_p=1.0, max_soft_tokens=4, weight_floor=0.1)
    want = sample_of(llm, soft=soft, seed=9, uids=[[4]], stream=1)
    for body in ({**BODY, **keys}, {**BODY, "vllm_xargs": {"soft": 1, **keys}}):
        (choice,) = served.post(CHAT, {**body, "return_soft": True})["choices"]
        assert record_of(choice) == record(want)
        assert choice["soft"]["kind"] == [1] * 4 + [0] * 5


def test_a_request_can_be_discrete_and_greedy_answers_keep_the_noise_of_thoughts(served, llm):
    (choice,) = served.post(CHAT, {**BODY, "soft": 0, "return_soft": True})["choices"]
    want = sample_of(llm)
    assert choice["message"]["content"] == want.text
    assert set(choice["soft"]["kind"]) == {0}
    greedy = {**BODY, "temperature": 0, "return_soft": True}
    (choice,) = served.post(CHAT, greedy)["choices"]
    params = SamplingParams(max_tokens=9, seed=3, temperature=0)
    assert record_of(choice) == record(sample_of(llm, params=params, soft=SoftParams()))


def test_echo_scores_a_prompt_as_the_model_does(served, hf_model, llm):
    """What lm-eval's local-completions sends for multiple choice."""
    ids = llm.tokenizer.encode(PROMPT)
    body = {"prompt": [ids, ids[:1]], "echo": True, "logprobs": 1, "max_tokens": 1}
    first, second = served.post(COMPLETIONS, {**body, "temperature": 0, "soft": 0})["choices"]
    with torch.no_grad():
        logp = hf_model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    got = first["logprobs"]
    names = [llm.tokenizer.decode([token]) for token in ids]
    greedy = int(logp[-1].argmax())
    assert got["tokens"] == [*names, llm.tokenizer.decode([greedy])]
    assert first["text"] == "".join(got["tokens"])
    assert got["text_offset"] == [0, 2, 4, 6, 8]
    assert got["token_logprobs"][0] is got["top_logprobs"][0] is None
    want = [float(logp[i, token]) for i, token in enumerate(ids[1:])]
    assert got["token_logprobs"][1:4] == pytest.approx(want, abs=2e-5)
    for i, token in enumerate(ids[1:]):
        best = int(logp[i].argmax())
        expected = {llm.tokenizer.decode([t]): float(logp[i, t]) for t in (best, token)}
        assert got["top_logprobs"][i + 1] == pytest.approx(expected, abs=2e-5)
    assert len(second["logprobs"]["tokens"]) == 2
    # The same without an answer; without log-probabilities; and once more from the cache.
    (alone,) = served.post(COMPLETIONS, {**body, "prompt": ids, "max_tokens": 0})["choices"]
    assert alone["text"] == PROMPT
    body_alone = {**body, "prompt": ids, "max_tokens": 0, "return_soft": True}
    answer = served.post(COMPLETIONS, {**body_alone, "return_positions": True})
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 0, "total_tokens": 4}
    assert answer["choices"][0]["soft"]["ids"] == answer["choices"][0]["positions"] == []
    assert alone["logprobs"]["tokens"] == names
    assert alone["logprobs"]["token_logprobs"][1:] == pytest.approx(want, abs=2e-5)
    plain = served.post(COMPLETIONS, {"prompt": PROMPT, "echo": True, "max_tokens": 1, "seed": 1})
    assert plain["choices"][0]["text"].startswith(PROMPT)
    assert plain["choices"][0]["logprobs"] is None


def test_tokens_as_ids_and_positions_as_people_read_them(served, llm):
    body = {**BODY, "logprobs": True, "top_logprobs": 5, "return_tokens_as_token_ids": True}
    (choice,) = served.post(CHAT, {**body, "return_positions": True})["choices"]
    want = sample_of(llm, soft=SoftParams())
    for i, entry in enumerate(choice["logprobs"]["content"]):
        assert entry["token"] == f"token_id:{want.token_ids[i]}"
        assert entry["logprob"] == pytest.approx(float(want.logprobs[i]))
        top = [int(other["token"].removeprefix("token_id:")) for other in entry["top_logprobs"]]
        assert top == record(want)[i][0]
    words = [position["token"] for position in choice["positions"]]
    assert "".join(words) == want.text
    for position in choice["positions"]:
        assert sum(weight for _, weight in position["candidates"]) == pytest.approx(1, abs=0.01)


def test_thinking_can_be_split_off(make_llm, serve):
    llm = make_llm()
    body = {**BODY, "max_tokens": 12, "soft_max_tokens": 4}
    with serve(llm, split_thinking=True) as server:
        (choice,) = server.post(CHAT, body)["choices"]
        message = choice["message"]
        assert len(message["reasoning_content"]) == 2 * 4
        assert message["content"]
        assert "</think>" not in message["content"] + message["reasoning_content"]
        pieces = [event["choices"][0]["delta"] for event in server.events(CHAT, body)]
        for name in ("reasoning_content", "content"):
            assert "".join(piece.get(name, "") for piece in pieces) == message[name]


def test_a_stop_string_may_begin_in_the_thoughts(make_llm, serve):
    llm = make_llm()
    body = {**BODY, "max_tokens": 12, "soft_max_tokens": 4}
    with serve(llm) as server:
        text = server.post(CHAT, body)["choices"][0]["message"]["content"]
    stop = text[7:10]  # the thoughts are four tokens of two letters
    with serve(llm, split_thinking=True) as server:
        (choice,) = server.post(CHAT, {**body, "stop": stop})["choices"]
        assert choice["message"]["reasoning_content"] == text[:7]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")
        pieces = [
            event["choices"][0]["delta"] for event in server.events(CHAT, body | {"stop": stop})
        ]
        assert "".join(piece.get("reasoning_content", "") for piece in pieces) == text[:7]


def test_what_other_clients_send_beside(served):
    """lighteval's and Open WebUI's bodies."""
    served.post(
        CHAT,
        {
            "model": "tiny",
            "messages": [
                {"role": "system", "content": "aa"},
                {"role": "user", "content": [{"type": "text", "text": "ab"}]},
            ],
            "max_tokens": 700,
            "max_completion_tokens": 4,
            "response_format": {"type": "text"},
            "logprobs": None,
            "frequency_penalty": 0.0,
            "presence_penalty": 0,
            "stop": None,
            "user": "somebody",
            "chat_id": "x",
        },
    )
    # Nothing says how long: what is left of the context.
    answer = served.post(CHAT, {"messages": MESSAGES, "ignore_eos": True, "soft": 0})
    assert answer["usage"]["total_tokens"] == 256
