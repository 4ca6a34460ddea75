"""`vllm serve` on two ranks: its processes, tensor parallelism, and the keys over HTTP."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from records import SEED

from softgrpo_engine import SamplingParams, SoftParams

RUN = Path(__file__).with_name("run_server.py")
START = 600  # seconds; four processes import vLLM


@pytest.fixture(scope="module")
def url(model, tokenizer, tmp_path_factory):
    """Of a server of the model, which ends with the tests."""
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(model)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    log = tmp_path_factory.mktemp("serve") / "log"
    options = {
        "model": model, "served-model-name": "tiny", "host": "127.0.0.1", "port": port,
        "dtype": "float32", "block-size": 32, "max-model-len": 256, "max-num-seqs": 8,
        "kv-cache-memory-bytes": 2**22, "tensor-parallel-size": 2,
        "additional-config": json.dumps({"softgrpo": {"default": {"soft_end_of_thinking": 2}}}),
    }  # fmt: skip
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, str(RUN), *arguments, "--enforce-eager"],
            stdout=file, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip
    try:
        _wait(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1/chat/completions"
    finally:
        server.terminate()
        server.wait(timeout=60)


def _wait(url, server, log):
    end = time.monotonic() + START
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    pytest.fail(f"no server after {START} s: {log.read_text()[-3000:]}")


def post(url, **body):
    """(status, text) of a chat."""
    message = {"role": "user", "content": "abacadbb"}
    body = {"model": "tiny", "messages": [message], "max_tokens": 8, "top_k": 5, **body}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def soft_keys(**more):
    return {"soft": 1, "soft_seed": SEED % 2**32, "soft_uid": 3, "soft_end_of_thinking": 2, **more}


def ids(candidates):
    return [int(candidate["token"].removeprefix("token_id:")) for candidate in candidates]


def test_a_chat_is_that_of_our_engine(url, ours, tokenizer):
    logprobs = {"logprobs": True, "top_logprobs": 5, "return_tokens_as_token_ids": True}
    status, text = post(url, vllm_xargs=soft_keys(), **logprobs)
    assert status == 200, text
    found = json.loads(text)["choices"][0]["logprobs"]["content"]
    prompt = tokenizer.encode("abacadbb", add_special_tokens=False)
    params, soft = SamplingParams(top_k=5, max_tokens=8), SoftParams(end_of_thinking=2)
    (output,) = ours.generate_groups([prompt], params, soft, seed=SEED % 2**32, uids=[[3]])
    record = output.samples[0].soft
    assert ids(found) == record.token.tolist()
    for position, candidates, gprime in zip(found, record.ids, record.gprime, strict=True):
        listed = candidates[candidates >= 0].tolist()
        shown = position["top_logprobs"][: len(listed)]
        assert ids(shown) == listed
        values = torch.tensor([candidate["logprob"] for candidate in shown])
        torch.testing.assert_close(values, gprime[: len(listed)], rtol=0, atol=1e-3)


def test_a_stream_by_default_has_the_same_text(url):
    """Of a client that says nothing of soft thinking, but for the noise, which would be random."""
    _, whole = post(url, vllm_xargs=soft_keys())
    noise = {name: soft_keys()[name] for name in ("soft_seed", "soft_uid")}
    status, text = post(url, vllm_xargs=noise, stream=True)
    assert status == 200
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert events[-1] == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
    streamed = "".join(delta.get("content") or "" for delta in deltas)
    assert streamed == json.loads(whole)["choices"][0]["message"]["content"]


def test_a_bad_key_is_a_400_and_the_server_goes_on(url):
    status, text = post(url, vllm_xargs=soft_keys(soft_tua=1))
    assert status == 400
    assert "unknown soft setting 'soft_tua'" in text
    status, text = post(url, vllm_xargs={"soft_min_tokens": 9})
    assert status == 400
    assert "min_soft_tokens=9 is more than max_tokens=8" in text
    assert post(url, temperature=0, vllm_xargs={"soft": 0})[0] == 200
