"""What a run takes up from its folder and what it writes there, one process or several."""

import json

import pytest

from softgrpo.config import Config, ConfigError
from softgrpo.distributed import World
from softgrpo.run.journal import Journal
from softgrpo.run.session import RunState


def config(tmp_path, *overrides):
    return Config.load("demo", [f"run.output_dir={tmp_path}", "run.name=mine", *overrides])


def rows_of(journal):
    lines = journal.folder.metrics.read_text().splitlines()
    return [json.loads(line) for line in lines]


def begun(tmp_path, *overrides, world=None):
    journal = Journal(config(tmp_path, *overrides), world or World())
    journal.folder.create("")
    journal.open(0)
    return journal


def test_steps_and_evaluations_are_rows(tmp_path, capsys):
    journal = begun(tmp_path)
    journal.step({"step": 1, "reward": 0.25, "step_time": 1.0})
    journal.evaluation({"step": 1, "eval/mean@2": 0.5})
    assert rows_of(journal) == [
        {"step": 1, "reward": 0.25, "step_time": 1.0},
        {"step": 1, "eval/mean@2": 0.5},
    ]
    shown = capsys.readouterr().out
    assert "reward 0.250" in shown
    assert "held-out after step 1: mean@2 0.500" in shown
    journal.close()
    assert journal.folder.path.joinpath("report.html").exists()


def test_rows_of_a_run_without_a_checkpoint_are_dropped(tmp_path):
    begun(tmp_path).record({"step": 1, "reward": 0.25})
    with pytest.raises(ConfigError, match="already holds a run"):
        Journal(config(tmp_path), World())
    (tmp_path / "mine" / "config.yaml").unlink()
    again = begun(tmp_path, "run.resume=auto")
    assert again.checkpoint is None
    assert rows_of(again) == []


def test_other_processes_write_and_show_nothing(tmp_path, capsys):
    class Another(World):
        def gather(self, value):
            return [value]

    journal = begun(tmp_path, world=Another(1, 2))
    journal.step({"step": 1, "reward": 0.25, "step_time": 1.0})
    journal.close()
    assert not (tmp_path / "mine").exists()
    assert capsys.readouterr().out == ""


def test_what_is_due():
    assert [RunState(step=step).is_due(3) for step in range(1, 7)] == [False, False, True] * 2
    assert not RunState(step=3).is_due(0)
