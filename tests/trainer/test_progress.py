"""The progress display: plain lines without a terminal, a panel on one, never in the way."""

import io
import time

import pytest
from rich.console import Console

from softgrpo.log.progress import TrainProgress

ROW = {
    "reward": 0.5,
    "completions/mean_length": 18.25,
    "completions/clipped_ratio": 0.03,
    "soft/length": 15.0,
    "grad_norm": 0.312,
    "loss": -0.001,
    "learning_rate": 1e-5,
    "tokens_per_second": 812.4,
    "step_time": 4.0,
    "time/rollout": 2.0,
    "time/reward": 0.0,
    "time/train": 1.8,
    "time/sync": 0.2,
}
SAMPLE = {
    "step": 5,
    "phase": "train",
    "prompt": "What is 47 - 38?\n[/bold]\x1b[2J",
    "answer": "9",
    "text": "9",
    "reward": 1.0,
    "advantage": None,
    "finish_reason": "stop",
    "uid": 1,
    "positions": [
        {"token": "It", "kind": 1, "forced": False, "candidates": [["It", 1.0]]},
        {"token": " is", "kind": 1, "forced": False, "candidates": [[" is", 0.6], [" =", 0.4]]},
        {"token": "\n", "kind": 0, "forced": False, "candidates": [["\n", 1.0]]},
        {"token": "9\x07", "kind": 0, "forced": True, "candidates": [["9\x07", 1.0]]},
    ],
}


def printed(encoding="utf-8"):
    """A progress that writes into a file, and the function that reads the file."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    progress = TrainProgress(Console(file=file, force_terminal=False, width=60))
    return progress, lambda: raw.getvalue().decode(encoding)


def on_terminal(width=100):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, height=30, _environ={})
    return TrainProgress(console), file.getvalue


def show_a_run(progress, steps=3):
    with progress:
        progress.start(10, 2, "demo")
        for step in range(3, 3 + steps):
            progress.phase("rollout", 3, 64)
            progress.step({"step": step, **ROW})


def test_plain_output_is_one_line_a_step(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # must not put colours into a log file
    progress = TrainProgress()
    show_a_run(progress)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "run demo: steps 3 to 10"
    assert len(lines) == 4
    assert lines[3] == (
        "step 5/10  reward 0.500  average 0.500  length 18.2  812 tokens/s  step 4.0 s "
        "(rollout 50% reward 0% train 45% sync 5%)  grad norm 0.312  ETA 0:20"
    )


def test_plain_output_has_no_control_characters():
    progress, output = printed()
    show_a_run(progress)
    progress.sample(SAMPLE)
    progress.evaluation({"step": 5, "eval/mean@8": 0.25, "eval/pass@8": 0.5, "eval/mean_length": 9})
    progress.message("stop\x1b[31m\nhere")
    text = output()
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "held-out after step 5: mean@8 0.250, pass@8 0.500\n" in text
    assert "stop\\x1b[31m↵here\n" in text


def test_sample_marks_mixtures_and_names_their_candidates():
    progress, output = printed()
    progress.sample(SAMPLE)
    text = output()
    assert "2 of 4 positions soft" in text
    assert "It« is»↵9\\x07" in text
    assert "2: ' is' 60%, ' =' 40%" in text
    assert "[/bold]" in text


def test_sample_without_positions():
    progress, output = printed()
    progress.sample({**SAMPLE, "positions": [], "reward": None})
    assert "reward -" in output()


def test_missing_numbers_are_left_out():
    progress, output = printed()
    progress.start(2, 0, "demo")
    progress.step({"step": 1, "reward": float("nan"), "grad_norm": None})
    assert output().splitlines()[1] == "step 1/2"


def test_text_that_the_stream_cannot_encode_does_not_stop_training():
    progress, output = printed("ascii")
    progress.sample({**SAMPLE, "prompt": "größer"})
    assert "gr??er" in output()


def test_panel_shows_the_run():
    progress, output = on_terminal()
    with progress:
        progress.start(40, 0, "demo")
        progress.evaluation({"step": 0, "eval/mean@8": 0.15})
        for step in (1, 2):
            progress.step({"step": step, **ROW})
        progress.sample(SAMPLE)
        progress.evaluation({"step": 2, "eval/mean@8": 0.45})
    text = output()
    for shown in ("step 2/40", "0.500", "812 tokens/s", "rollout 50%", "0.150 → 0.450", "2:32"):
        assert shown in text
    assert "\x1b[2J" not in text


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_terminal_is_left_sane(error):
    progress, output = on_terminal()

    def fail():
        with progress:
            progress.start(10, 0, "demo")
            raise error

    with pytest.raises(error):
        fail()
    text = output()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # cursor shown again
    assert text.endswith(("\n", "\x1b[?25h"))


def test_cursor_is_visible_while_it_runs():
    """A run that is killed cannot bring it back."""
    progress, output = on_terminal()
    with progress:
        text = output()
        assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


@pytest.mark.parametrize("make", [printed, on_terminal])
def test_a_step_costs_under_two_milliseconds(make):
    progress, _ = make()
    with progress:
        progress.start(200, 0, "demo")
        costs = []
        for step in range(1, 201):
            begin = time.perf_counter()
            progress.phase("rollout", step, 200)
            progress.step({"step": step, **ROW})
            costs.append(time.perf_counter() - begin)
    assert sorted(costs)[100] < 2e-3
