"""What a server refuses, and what it survives: nothing is lost, nothing is left behind."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from softgrpo.serve.answers import Answers

pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "aaabacad"}]
BODY = {"messages": MESSAGES, "max_tokens": 5, "seed": 3}
ENDLESS = {"messages": MESSAGES, "max_tokens": 240, "ignore_eos": True, "soft": 0}

# What is wrong with a chat, and a word of what is said of it.
WRONG = {
    "no messages": ({"messages": []}, "messages"),
    "a message without a role": ({"messages": [{"content": "x"}]}, "messages[0]"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content"),
    "a text for a number": ({"temperature": "hot"}, "temperature"),
    "a number that overflows": ({"temperature": 1e300}, "temperature"),
    "a denormal": ({"soft_tau": 1e-40}, "soft_tau"),
    "true for an integer": ({"n": True}, "n=true"),
    "no sample": ({"n": 0}, "n=0"),
    "too many samples": ({"n": 1000}, "1000 samples"),
    "no token": ({"max_tokens": 0}, "max_tokens"),
    "an empty stop string": ({"stop": ["x", ""]}, "stop"),
    "too many stop strings": ({"stop": ["x"] * 17}, "stop"),
    "a long stop string": ({"stop": "x" * 257}, "256 characters"),
    "an id outside the vocabulary": ({"stop_token_ids": [97]}, "stop_token_ids"),
    "an unknown soft key": ({"soft_tua": 1}, "soft_tua"),
    "an unknown soft key of vLLM": ({"vllm_xargs": {"soft_tua": 1}}, "soft_tua"),
    "a setting of other noise": (
        {"soft_noise": "multiplex", "soft_weight_floor": 0.5},
        "weight_floor",
    ),
    "an unknown noise": ({"soft_noise": "loud"}, "noise"),
    "half of a clip": ({"soft_clip_low": 0}, "soft_clip_high"),
    "more thoughts than tokens": ({"soft_min_tokens": 9}, "min_soft_tokens"),
    "an end of thinking that is none": ({"soft_end_of_thinking": "aaab"}, "end_of_thinking"),
    "a uid that does not fit": ({"soft_uid": -1}, "uid"),
    "what the engine cannot do": ({"frequency_penalty": 0.5}, "frequency_penalty"),
    "tools": ({"tools": [{"type": "function"}]}, "tools"),
    "settings of the template": ({"chat_template_kwargs": {"enable_thinking": False}}, "template"),
    "alternatives of nothing": ({"top_logprobs": 2}, "logprobs=true"),
    "no token by its newer name": ({"max_completion_tokens": 0}, "max_completion_tokens"),
    "a message without a content": ({"messages": [{"role": "user"}]}, "content"),
    "a call of a tool": (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]},
        "tool_calls",
    ),
    "a stream that is no word": ({"soft": 0, "soft_stream": -1}, "stream"),
    "a form of answer": ({"response_format": {"type": "json_object"}}, "response_format"),
    "longer than the context": ({"max_tokens": 253}, "256"),
    "much longer": ({"messages": [{"role": "user", "content": "aa" * 9999}]}, "characters"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_one_clear_line(served, case):
    change, said = WRONG[case]
    status, error = served.error(CHAT, {**BODY, **change})
    assert status == 400
    assert said in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        *(b"{bad", b"[1]", b"\xff", b'{"n": NaN}', b"[" * 100_000, b'{"user": "\\ud800"}', b""),
        # Half of a surrogate pair, as bytes.
        b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
        json.dumps(BODY).encode("utf-16"),
    ],
)
def test_a_body_that_is_no_json_object(served, body):
    assert served.error(CHAT, body)[0] == 400


def test_other_errors_have_the_same_form(served, monkeypatch):
    assert served.error("/v1/nothing", {})[0] == 404
    assert served.error("/v1/models", {})[0] == 405
    status, error = served.error(CHAT, {**BODY, "model": "gpt-4"})
    assert (status, error["param"]) == (404, "model")
    # Echo would have to come before the first token.
    assert served.error(COMPLETIONS, {"prompt": "aa", "echo": True, "stream": True})[0] == 400
    assert served.error(COMPLETIONS, {"prompt": ["aa", "ab"], "soft_uid": 1})[0] == 400
    assert served.error(COMPLETIONS, {"prompt": [1000]})[0] == 400
    many = {"prompt": [[3] * 250] * 8, "echo": True, "logprobs": 64, "max_tokens": 1}
    monkeypatch.setattr("softgrpo.serve.jobs._MOST_LOGPROBS", 250 * 65)
    for body in ({**many, "n": 1}, {**many, "prompt": [3] * 250, "n": 2}):
        assert "logprobs=64" in served.error(COMPLETIONS, body)[1]["message"]
    served.post(COMPLETIONS, {**many, "prompt": [3] * 250, "n": 1})


def test_health_is_that_of_the_engine(make_llm, serve, monkeypatch):
    """An error of one step is over with it; one that the device stays in is not."""
    llm = make_llm()
    step = llm.step

    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with serve(llm) as server:
        llm.step = broken
        assert server.error(CHAT, BODY)[0] == 500
        assert server.request("GET", "/health")[::2] == (200, b'{"status":"ok"}')
        llm.step = step
        server.post(CHAT, BODY)
        llm.step = broken
        monkeypatch.setattr("softgrpo_engine.async_llm.check_device", lambda device: broken())
        assert server.error(CHAT, BODY)[0] == 500
        status, _, answer = server.request("GET", "/health")
        assert status == 503
        assert json.loads(answer) == {
            "status": "unhealthy",
            "reason": "the engine failed for good: start the server again",
        }


def test_an_answer_that_is_long_to_write_holds_up_nobody(served, monkeypatch):
    writing, go_on = threading.Event(), threading.Event()
    choice = Answers.choice

    def slow(*args):
        writing.set()
        assert go_on.wait(10)
        return choice(*args)

    monkeypatch.setattr(Answers, "choice", slow)
    with ThreadPoolExecutor(1) as client:
        answer = client.submit(served.post, CHAT, BODY)
        assert writing.wait(10)
        assert served.request("GET", "/health")[0] == 200
        go_on.set()
        answer.result()


@pytest.mark.parametrize("says_its_length", [True, False])
def test_a_body_that_is_too_large_is_not_read(served, monkeypatch, says_its_length):
    monkeypatch.setattr("softgrpo.serve.admission.MOST_BYTES", 50_000)
    connection = served.connect()
    if says_its_length:
        connection.putrequest("POST", CHAT)
        connection.putheader("Content-Length", str(10**12))
        connection.endheaders()
    else:
        chunks = (b"x" * 10_000 for _ in range(6))
        connection.request("POST", CHAT, chunks, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    served.post(CHAT, BODY)


def test_a_body_that_does_not_come(served, monkeypatch):
    monkeypatch.setattr("softgrpo.serve.admission._BODY_SECONDS", 0.05)
    connection = served.connect()
    connection.putrequest("POST", CHAT)
    connection.putheader("Content-Length", "10")
    connection.endheaders()
    assert connection.getresponse().status == 408
    connection.close()


def test_a_client_that_leaves_before_its_body_is_no_mistake(served, caplog):
    route = f'softgrpo_requests_total{{route="{CHAT}",status="499"}}'
    before = served.metric(route)
    connection = served.connect()
    connection.putrequest("POST", CHAT)
    connection.putheader("Content-Length", "10")
    connection.endheaders(b"{")
    connection.close()
    give_up = time.monotonic() + 10
    while served.metric(route) == before:
        assert time.monotonic() < give_up
    assert "Traceback" not in caplog.text


def open_stream(server, body, has_begun=True):
    """A socket with a stream, which has begun or is about to."""
    client = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    data = json.dumps({**body, "stream": True}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    client.sendall(head.encode() + data)
    if has_begun:
        assert client.recv(20).startswith(b"HTTP/1.1 200")
    return client


def slowed(llm):
    """The engine with steps that take as long as those of a model."""
    step = llm.step
    llm.step = lambda: time.sleep(0.02) or step()
    return llm


def test_a_full_queue_sends_clients_away(make_llm, serve):
    llm = slowed(make_llm(max_batch_size=1))
    with serve(llm, max_waiting=1) as server:
        with open_stream(server, ENDLESS), open_stream(server, ENDLESS, has_begun=False):
            while llm.metrics()["waiting"] == 0:
                time.sleep(0.01)
            status, headers, _ = server.request("POST", CHAT, BODY)
            assert status == 429
            assert int(headers["retry-after"]) >= 1
            assert server.request("GET", "/health")[0] == 200
        server.wait_until_idle()
        server.post(CHAT, BODY)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_leaves_takes_its_samples_out(make_llm, serve, is_streamed):
    llm = slowed(make_llm())
    with serve(llm) as server:
        if is_streamed:
            client = open_stream(server, ENDLESS)
        else:
            client = server.connect()
            client.request("POST", CHAT, json.dumps(ENDLESS))
            while llm.metrics()["generated_tokens"] == 0:
                time.sleep(0.01)
        client.close()
        server.wait_until_idle()
        assert llm.metrics()["generated_tokens"] < 200
        assert server.metric(f'softgrpo_requests_total{{route="{CHAT}",status="499"}}') == 1


def test_a_reader_that_stops_holds_up_nobody_and_is_let_go(make_llm, serve, monkeypatch):
    monkeypatch.setattr("softgrpo.serve.stream.SEND_SECONDS", 0.3)
    llm = make_llm(max_batch_size=2)
    # So much text a token that the buffers between server and client are soon full.
    body = {**ENDLESS, "n": 1, "return_positions": True, "return_soft": True, "top_k": 60}
    with serve(llm) as server:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", server.port))
        data = json.dumps({**body, "stream": True}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        client.sendall(head.encode() + data)
        for _ in range(3):
            server.post(CHAT, BODY)
        give_up = time.monotonic() + 10
        while not server.metric(f'softgrpo_requests_total{{route="{CHAT}",status="499"}}'):
            assert time.monotonic() < give_up
            time.sleep(0.05)
        server.wait_until_idle()
        client.close()


def test_what_breaks_in_a_step_is_no_ones_traceback(make_llm, serve, caplog):
    llm = make_llm()
    with serve(llm) as server:
        run, broken = llm.runner.run, RuntimeError("cannot open /home/me/secret")
        llm.runner.run = lambda plan: (_ for _ in ()).throw(broken)
        status, error = server.error(CHAT, BODY)
        assert status == 500
        assert "secret" not in error["message"]
        assert "/home/me/secret" in caplog.text
        llm.runner.run = run
        server.post(CHAT, BODY)
        # In the middle of a stream it is the last event.
        steps = iter(range(4))
        llm.runner.run = lambda plan: run(plan) if next(steps, None) is not None else 1 / 0
        *_, last = server.events(CHAT, ENDLESS)
        assert last["error"]["type"] == "server_error"
        llm.runner.run = run
        server.wait_until_idle()


def test_traffic_of_all_kinds_at_once(make_llm, serve):
    """Every good request gets the answer that it gets alone."""
    llm = make_llm(max_batch_size=6)
    with serve(llm) as server:
        good = [{**BODY, "max_tokens": 3 + 5 * i, "seed": i, "soft": i % 2} for i in range(6)]
        want = [server.post(CHAT, body)["choices"] for body in good]

        def client(number):
            chance = random.Random(number)
            for _ in range(8):
                kind = chance.randrange(4)
                i = chance.randrange(len(good))
                if kind == 0:
                    open_stream(server, {**ENDLESS, "max_tokens": 60}).close()
                elif kind == 1:
                    change, _ = chance.choice(list(WRONG.values()))
                    assert server.error(CHAT, {**BODY, **change})[0] == 400
                elif kind == 2:
                    events = server.events(CHAT, good[i])
                    deltas = [event["choices"][0]["delta"] for event in events]
                    text = "".join(delta.get("content", "") for delta in deltas)
                    assert text == want[i][0]["message"]["content"]
                else:
                    assert server.post(CHAT, good[i])["choices"] == want[i]

        with ThreadPoolExecutor(8) as clients:
            list(clients.map(client, range(8)))
        server.wait_until_idle()
        server.llm.scheduler.check()


def test_sigterm_lets_answers_end(tmp_path, hf_model, make_llm):
    """The command itself, in a process of its own."""
    hf_model.save_pretrained(tmp_path / "model")
    make_llm().tokenizer.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "softgrpo.cli.serve", "--model", str(tmp_path / "model")]
    command += ["--port", "0", "--dtype", "float32", "--kv-memory", "0.01"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ})
    try:
        line = process.stdout.readline()
        assert line.startswith(f"serving {tmp_path.name} on http://127.0.0.1:")
        port = int(line.split(":")[2].split()[0])
        server = type("Server", (), {"port": port})
        client = open_stream(server, ENDLESS)
        process.send_signal(signal.SIGTERM)
        answer = b""
        while part := client.recv(65536):
            answer += part
        assert b"data: [DONE]" in answer
        assert b'"finish_reason": "length"' in answer
        assert process.wait(20) in (0, -signal.SIGTERM)
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port), timeout=1)
    finally:
        process.kill()
        process.wait()


def test_an_end_at_once_is_no_mistake(make_llm, serve, caplog):
    """A second Ctrl-C."""
    with serve(slowed(make_llm())) as server:
        client = open_stream(server, ENDLESS)
        server.server.should_exit = server.server.force_exit = True
        server.thread.join(10)
        assert not server.thread.is_alive()
        client.close()
    assert "ASGI callable returned without completing" in caplog.text
    assert "Traceback" not in caplog.text


def test_the_command_says_what_is_wrong(capsys):
    from softgrpo.cli.serve import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["--model", "no/such", "--port", port]) == 2
    assert f"port {port}" in capsys.readouterr().err
    assert main(["--model", "./nowhere", "--port", "0"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_port_that_another_server_took_meanwhile_is_one_line(make_llm, monkeypatch, capsys):
    """Both were loading their models: neither listened yet."""
    from softgrpo.cli.serve import main

    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        port = str(other.getsockname()[1])

        def load(*args, **options):
            other.listen()
            return make_llm()

        monkeypatch.setattr("softgrpo_engine.LLM", load)
        monkeypatch.setattr("softgrpo_engine.model.source.resolve_model", lambda name: name)
        assert main(["--model", "tiny", "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err
