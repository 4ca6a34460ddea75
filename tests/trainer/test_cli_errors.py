"""What the commands say in one line, and what keeps its traceback."""

import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

from softgrpo.cli.errors import is_for_the_user, one_line_errors
from softgrpo.config import Config, ConfigError
from softgrpo.distributed import LostProcess
from softgrpo.run.interrupt import Interrupted
from softgrpo_engine import SamplingParams
from softgrpo_engine.model.source import resolve_model
from softgrpo_kernels import soft_weights


def error_of(run):
    try:
        run()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def in_package(package, body):
    """A function that runs `body` as if it stood in a module of this package."""
    names = {"__name__": f"{package}.module", "__package__": package, "torch": torch}
    exec("def run():\n" + "".join(f"    {line}\n" for line in body.splitlines()), names)
    return names["run"]


def ours(body):
    return in_package("softgrpo", body)


def lost():
    raise LostProcess("process 0 lost contact")


MEANT = {
    "a key": lambda: Config.load("demo", ["optim.lr=fast"]),
    "a setting of the engine": lambda: SamplingParams(temperature=-1.0),
    "a model": lambda: resolve_model("./nowhere"),
    "a process": lost,
    "a file": Path("no/such/file").read_text,
    "a file, in words": ours("raise OSError('cannot write checkpoints: disk full')"),
    "a number": ours("raise FloatingPointError('the gradient norm is nan; lower optim.lr')"),
    "from another": ours(
        "try:\n    int('x')\nexcept ValueError as error:\n    raise ValueError('--k') from error"
    ),
    "over lines": ours("raise ValueError(\n    'one, '\n    'two'\n)"),
    "in a package of ours": in_package("softgrpo.evaluation", "raise ValueError('no such task')"),
}
MISTAKES = {
    "int": ours("int('x')"),
    "zip": ours("list(zip([1], [1, 2], strict=True))"),
    "shapes": ours("torch.zeros(2) @ torch.zeros(3)"),
    "devices": ours("torch.zeros(2) + torch.zeros(2, device='meta').cpu()"),
    "index": ours("[][0]"),
    "raised again": ours("try:\n    int('x')\nexcept ValueError:\n    raise"),
    "in the kernels": lambda: soft_weights(torch.zeros(2, 3), torch.zeros(5), -1.0),
    "in another library": in_package("torch.nn", "raise ValueError('dim')"),
    "in a package of a like name": in_package("softgrpo_plugin", "raise ValueError('dim')"),
    "a runtime error": ours("raise RuntimeError('a page was lost')"),
    "an unnamed file": lambda: os.write(10**6, b""),
}


@pytest.mark.parametrize("case", MEANT)
def test_what_was_meant_for_the_user_is_one_line(case, capsys):
    assert is_for_the_user(error := error_of(MEANT[case]))
    with pytest.raises(SystemExit) as stop, one_line_errors("softgrpo-test"):
        MEANT[case]()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said == f"softgrpo-test: error: {' '.join(str(error).split())}\n"


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_of_the_program_keeps_its_traceback(case, capsys):
    expected = type(error_of(MISTAKES[case]))
    with pytest.raises(expected), one_line_errors("softgrpo-test"):
        MISTAKES[case]()
    assert capsys.readouterr().err == ""


def test_debugging_shows_where_an_expected_error_came_from(monkeypatch):
    monkeypatch.setenv("SOFTGRPO_DEBUG", "1")
    with pytest.raises(ConfigError), one_line_errors("softgrpo-test"):
        MEANT["a key"]()


def test_a_command_that_is_run_as_a_module_is_ours(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["softgrpo-eval", "--samples", "0"])
    monkeypatch.delitem(sys.modules, "softgrpo.cli.eval", raising=False)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("softgrpo.cli.eval", run_name="__main__")
    assert capsys.readouterr().err == (
        "softgrpo-eval: error: --samples 0 is not allowed: must be >= 1\n"
    )


def test_signals_are_128_and_their_number(capsys):
    for error, status in ((Interrupted(15, 3, 9), 143), (KeyboardInterrupt(), 130)):
        with pytest.raises(SystemExit) as stop, one_line_errors("softgrpo-test"):
            raise error
        assert stop.value.code == status
        assert "Traceback" not in capsys.readouterr().err
