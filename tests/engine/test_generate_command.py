"""softgrpo-generate on a tiny model directory: one answer, and a chat in a pseudo-terminal."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from softgrpo.cli.generate import _Session, _turn, main
from softgrpo_engine import LLM, SamplingParams, SoftParams


@pytest.fixture
def model(saved_model, device):
    """A model for a command that finds the CPU, and one that finds a GPU."""
    return saved_model


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory, hf_model, tokenizer):
    """Its template writes the turns one after the other: ab before the user's, ba before ours."""
    path = tmp_path_factory.mktemp("chat_model")
    hf_model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ 'ab' if m.role == 'user' else 'ba' }}{{ m.content }}{% endfor %}"
    )
    return path


def run(capsys, *arguments):
    status = main([str(x) for x in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def sample_of(model, prompt, soft, **params):
    llm = LLM(model)
    (output,) = llm.generate(prompt, SamplingParams(**params), soft, progress=False)
    return llm.tokenizer, output.samples


def check_candidates(lines, tokenizer, sample):
    """Each position is a line: its number, and every candidate with its weight."""
    for i, row in enumerate(sample.soft.ids.tolist()):
        words = [tokenizer.decode([token]) for token in row if token >= 0]
        cells = next(cells for cells in map(str.split, lines) if cells[:1] == [str(i)])
        assert cells[1::2] == words
        assert abs(sum(map(float, cells[2::2])) - 1.0) < 0.03


def test_one_prompt_gives_the_text_alone(capsys, monkeypatch, model):
    monkeypatch.setattr("sys.stdin", io.StringIO("aaab\n"))
    for arguments in (["--prompt", "aaab"], []):  # as an argument, and through a pipe
        status, out, _ = run(capsys, model, *arguments, "--max-tokens", 4, "--seed", 3)
        assert status == 0
        _, (sample,) = sample_of(model, "aaab", False, max_tokens=4, seed=3)
        assert out == f"{sample.text}\n"


def test_several_answers_are_written_whole(capsys, model):
    _, out, _ = run(
        capsys, model, "--prompt", "aaab", "--n", 3, "--max-tokens", 4, "--seed", 3, "--soft"
    )
    _, samples = sample_of(model, "aaab", SoftParams(), max_tokens=4, seed=3, n=3)
    assert sorted(out.splitlines()) == sorted(sample.text for sample in samples)


def test_candidates_of_every_position_are_shown(capsys, model):
    flags = ["--soft", "--tau", 1.0, "--max-tokens", 3, "--seed", 1, "--candidates"]
    status, out, _ = run(capsys, model, "--prompt", "aaab", *flags)
    assert status == 0
    tokenizer, (sample,) = sample_of(model, "aaab", SoftParams(tau=1.0), max_tokens=3, seed=1)
    check_candidates(out.splitlines(), tokenizer, sample)
    assert out.splitlines()[-1] == sample.text


class Terminal:
    """The command in a pseudo-terminal, as a user has it."""

    def __init__(self, *arguments):
        master, slave = pty.openpty()
        command = [sys.executable, "-m", "softgrpo.cli.generate", *map(str, arguments)]
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "160"}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, close_fds=True
        )
        os.close(slave)
        self.master = master

    def read(self, until="\n> "):
        """Lines up to ``until``, without colours and carriage returns."""
        output, text, end = b"", "", time.monotonic() + 30
        while not text or not text.endswith(until):
            ready, _, _ = select.select([self.master], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no {until!r} after {text!r}"
            output += os.read(self.master, 4096)
            text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", output.decode())
        return text.splitlines()

    def say(self, line, until="\n> "):
        os.write(self.master, f"{line}\n".encode())
        return self.read(until)

    def end(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(chat_model):
    terminal = Terminal(
        chat_model, "--soft", "--tau", 1, "--seed", 1, "--max-tokens", 6, "--max-soft-tokens", 4
    )
    yield terminal
    terminal.end()


def test_a_chat_keeps_the_conversation_and_shows_candidates(terminal, chat_model):
    terminal.read()
    soft = SoftParams(tau=1.0, max_soft_tokens=4)
    params = {"max_tokens": 6, "seed": 1}
    turns = [{"role": "user", "content": "aaab"}]
    tokenizer, (first,) = sample_of(chat_model, turns, soft, **params)
    shown = terminal.say("aaab")
    assert first.text in shown
    lines = terminal.say("/candidates")
    thinking = [line for line in lines if re.match(r" +\d+ ", line)]
    assert len(thinking) == len(first.token_ids)
    words = [tokenizer.decode([t]) for t in first.soft.ids[0].tolist() if t >= 0]
    assert thinking[0].split()[1::2] == words
    turns += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "acad"}]
    _, (second,) = sample_of(chat_model, turns, soft, **params)
    assert second.text in terminal.say("acad")
    terminal.say("/clear")
    assert first.text in terminal.say("aaab")
    assert any("/quit" in line for line in terminal.say("/help"))
    os.write(terminal.master, b"/quit\n")
    assert terminal.process.wait(timeout=20) == 0


def test_ctrl_c_ends_the_answer_and_not_the_program(chat_model):
    terminal = Terminal(chat_model, "--discrete", "--max-tokens", 500, "--temperature", 0)
    try:
        terminal.read()
        terminal.say("aaab", until="aaab\n")  # the echo
        terminal.read(until="")  # and the first piece of the answer
        terminal.process.send_signal(signal.SIGINT)
        assert any("interrupted" in line for line in terminal.read())
        os.write(terminal.master, b"\x04")  # Ctrl-D
        assert terminal.process.wait(timeout=20) == 0
    finally:
        terminal.end()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-p", "2"], "top_p=2.0 is not allowed"),
        (["--tau", "0.5"], "--tau is a setting of soft tokens: add --soft"),
        (["--max-soft-tokens", "5"], "--max-soft-tokens is a setting of soft tokens"),
        (["--max-tokens", "100000"], "prompt 0 has 2 tokens.*context is 512"),
    ],
)
def test_mistakes_get_one_line(capsys, model, arguments, message):
    status, out, err = run(capsys, model, "--prompt", "aaab", *arguments)
    assert status == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert re.search(message, err)


def test_a_model_without_a_chat_template_wants_a_prompt(capsys, monkeypatch, model):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    status, _, err = run(capsys, model)
    assert status == 2
    assert "no chat template: give a --prompt" in err
    status, _, err = run(capsys, model, "--n", 2)
    assert "--raw and --n need a --prompt" in err


def test_the_model_is_looked_for_before_the_prompt(capsys, monkeypatch, model):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    status, out, err = run(capsys, "nosuch")
    assert (status, out) == (2, "")
    assert err.startswith("softgrpo-generate: error: no model 'nosuch'")
    status, _, err = run(capsys, model)
    assert (status, err) == (2, "softgrpo-generate: error: the prompt on stdin is empty\n")


def test_a_mistake_of_the_program_in_a_chat_is_no_line():
    """Only what cannot be asked leaves the conversation as it was."""

    class Broken(_Session):
        def answer(self, prompt):
            return int("x")

    session = Broken(None, SamplingParams(), False, False)
    with pytest.raises(ValueError, match="invalid literal"):
        _turn(session, [], "aa")
