"""OpenAI's own client, where it is installed."""

import pytest

pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")
openai = pytest.importorskip("openai", reason="openai is not installed (extra [dev])")

MESSAGES = [{"role": "user", "content": "aaabacad"}]


@pytest.fixture
def client(served):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="x", max_retries=0)


def test_chat_stream_completion_and_models(client):
    ask = {"model": "tiny", "messages": MESSAGES, "max_tokens": 6, "seed": 1}
    extra = {"soft_tau": 0.5, "return_soft": True}
    whole = client.chat.completions.create(
        **ask, n=2, logprobs=True, top_logprobs=3, extra_body=extra
    )
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert len(whole.choices[0].soft["ids"]) == whole.usage.completion_tokens / 2 == 6
    assert len(whole.choices[0].logprobs.content) == 6
    chunks = client.chat.completions.create(**ask, stream=True, extra_body=extra)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    completion = client.completions.create(
        model="tiny", prompt="aaab", max_tokens=1, echo=True, logprobs=1
    )
    assert completion.choices[0].logprobs.token_logprobs[0] is None
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_errors_are_its_own(client):
    with pytest.raises(openai.BadRequestError, match="soft_tua"):
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, extra_body={"soft_tua": 0.5}
        )
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.chat.completions.create(model="other", messages=MESSAGES)
