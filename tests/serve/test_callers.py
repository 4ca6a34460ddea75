"""Who may use a server: by its key, and by the names that it goes by."""

import pytest

pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "aaabacad"}], "max_tokens": 5, "seed": 3}


def test_the_key(make_llm, serve):
    with serve(make_llm(), api_key="secret") as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secreta"}):
            assert server.error(CHAT, BODY, **headers)[0] == 401
        assert server.request("GET", "/v1/models")[0] == 401
        assert server.request("GET", "/health")[0] == 200
        server.post(CHAT, BODY, Authorization="Bearer secret")


def test_the_key_may_come_from_the_environment(make_llm, monkeypatch, capsys):
    """Where no list of processes shows it; that of the command line wins."""
    import softgrpo.serve.app
    from softgrpo.cli.serve import main

    keys = []

    def make_app(llm, settings):
        keys.append(settings.api_key)
        raise SystemExit(7)

    monkeypatch.setattr(softgrpo.serve.app, "make_app", make_app)
    monkeypatch.setattr("softgrpo_engine.LLM", lambda *args, **options: make_llm())
    monkeypatch.setattr("softgrpo_engine.model.source.resolve_model", lambda name: name)
    monkeypatch.setenv("SOFTGRPO_API_KEY", "of the environment")
    command = ["--model", "tiny", "--port", "0"]
    assert main(command) == main([*command, "--api-key", "given"]) == 7
    monkeypatch.delenv("SOFTGRPO_API_KEY")
    assert main(command) == 7
    assert keys == ["of the environment", "given", None]
    capsys.readouterr()
    monkeypatch.setenv("SOFTGRPO_API_KEY", "")
    assert main(command) == 2
    assert "an empty SOFTGRPO_API_KEY would let everybody in" in capsys.readouterr().err


def test_a_key_may_be_in_any_letters(make_llm, serve):
    with serve(make_llm(), api_key="clé") as server:
        server.post(CHAT, BODY, Authorization="Bearer clé".encode())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "rebound.example.com"}, 403),
        ({"Host": "127.0.0.1.example.com:8000"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "host.docker.internal:8000"}, 200),
    ],
)
def test_pages_of_the_web_cannot_use_the_server_of_their_reader(served, headers, status):
    assert served.request("POST", CHAT, BODY, **headers)[0] == status
    assert served.request("GET", "/v1/models", **headers)[0] == status


def test_a_server_for_others_goes_by_any_name(make_llm, serve):
    elsewhere = {"Host": "models.example.com"}
    with serve(make_llm(), is_local=False) as server:
        server.post(CHAT, BODY, **elsewhere)
    with serve(make_llm(), api_key="secret") as server:
        server.post(CHAT, BODY, Authorization="Bearer secret", **elsewhere)
