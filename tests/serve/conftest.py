"""A server around the tiny model, in a thread, and requests to it by the standard library."""

import copy
import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager

import pytest

from softgrpo_engine import LLM, SoftParams
from softgrpo_engine.model.config import DecoderConfig
from softgrpo_engine.model.decoder import Decoder
from softgrpo_engine.model.weights import load_weights

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="session")
def make_llm(hf_model, tokenizer):
    """make_llm(...): an engine with a chat template; keyword arguments go to LLM."""

    def make(**options):
        decoder = Decoder(DecoderConfig.from_hf(hf_model.config))
        load_weights(decoder, iter(copy.deepcopy(hf_model.state_dict()).items()))
        ours = copy.deepcopy(tokenizer)
        ours.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        options = {"max_batch_size": 8, "max_model_len": 256, "device": "cpu"} | options
        return LLM(decoder, tokenizer=ours, **options)

    return make


class Served:
    """A running server."""

    def __init__(self, llm, **settings):
        import uvicorn

        from softgrpo.serve.app import make_app
        from softgrpo.serve.settings import ServeSettings

        self.llm = llm
        settings = {"name": "tiny", "soft": SoftParams()} | settings
        app = make_app(llm, ServeSettings(**settings))
        # Its log goes where pytest finds it.
        config = uvicorn.Config(app, log_config=None, log_level="error", lifespan="off")
        self.server = uvicorn.Server(config)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))
        self.thread.start()

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def request(self, method, path, body=None, **headers):
        """(status, headers, body) of a request; a body that is no bytes goes as JSON."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        connection = self.connect()
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, dict(response.headers), response.read()
        finally:
            connection.close()

    def post(self, path, body, **headers):
        """The JSON of an answer with status 200."""
        status, _, answer = self.request("POST", path, body, **headers)
        assert status == 200, answer
        return json.loads(answer)

    def error(self, path, body, method="POST", **headers):
        """(status, the error) of an answer that is one."""
        status, _, answer = self.request(method, path, body, **headers)
        error = json.loads(answer)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert "\n" not in error["message"]
        return status, error

    def events(self, path, body):
        """The events of a stream, which ends with [DONE]."""
        status, headers, answer = self.request("POST", path, {**body, "stream": True})
        assert status == 200, answer
        assert headers["content-type"].startswith("text/event-stream")
        *events, done, rest = answer.decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def metric(self, line):
        """The value of one line of /metrics; 0 without it."""
        text = self.request("GET", "/metrics")[2].decode()
        values = [found.split()[-1] for found in text.splitlines() if found.startswith(line + " ")]
        return float(values[0]) if values else 0.0

    def wait_until_idle(self):
        """Until the engine has nothing left; all that it had is free again."""
        give_up = time.monotonic() + 10
        while self.llm.scheduler.has_work:
            assert time.monotonic() < give_up
            time.sleep(0.01)
        metrics = self.llm.metrics()
        assert metrics["kv_pages_free"] == metrics["kv_pages"]


@contextmanager
def serving(llm, **settings):
    served = Served(llm, **settings)
    try:
        yield served
    finally:
        served.server.should_exit = True
        served.thread.join(20)
        assert not served.thread.is_alive()


@pytest.fixture(scope="session")
def served(make_llm):
    """A server whose default is soft."""
    with serving(make_llm()) as found:
        yield found


@pytest.fixture(scope="session")
def serve():
    """serve(llm, ...): a context with a server of its own."""
    return serving


@pytest.fixture(scope="session")
def llm(make_llm):
    """The same model without a server."""
    return make_llm()
