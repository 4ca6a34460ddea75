"""benchmarks/learning: its cells are runs that there are, and the rate is chosen by training."""

import json
from pathlib import Path

import pytest

from softgrpo.config import Config
from softgrpo.rollout.sampling import density_settings

FOLDER = Path(__file__).parents[2] / "benchmarks" / "learning"
PATHS = ("model.path=x", "data.train=x", "data.eval=x")


@pytest.fixture
def grid(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(FOLDER)
    import grid

    monkeypatch.setattr(grid, "RECORDS", tmp_path)
    return grid


def test_every_cell_and_every_kind_of_rollout_is_a_run(grid):
    from gradients import KINDS

    changes = [cell.overrides for cell in grid.first_cells()] + [own for own, _ in KINDS.values()]
    for overrides in changes:
        density_settings(Config.load(str(FOLDER / "easy.yaml"), [*PATHS, *overrides]))
    assert {"soft, tau 0.5, floor 0.01, top_p 1", "multiplex 3", "discrete, top_p 1"} <= set(KINDS)


def test_the_rate_is_that_of_the_best_last_training_steps(grid):
    def record(rate, rewards, held_out):
        cell = grid.cell_of("easy", "censored", rate, 0)
        row = {"reward": rewards, "scores": {"soft": {"mean": {"value": held_out}}}}
        grid.record_path(cell).write_text(json.dumps(row))

    record("5e-6", [0.9] * 5 + [0.2] * grid.LAST, held_out=0.3)
    record("1e-5", [0.1] * 5 + [0.6] * grid.LAST, held_out=0.1)
    assert grid.best_rate("easy", "censored") is None
    assert grid.later_cells() == []
    record("2e-5", [0.9] * 5 + [0.5] * grid.LAST, held_out=0.9)
    assert grid.best_rate("easy", "censored") == "1e-5"
    assert [cell.path for cell in grid.later_cells()] == [
        "easy/grid-censored-lr-1e-5-1", "easy/grid-censored-lr-1e-5-2"
    ]  # fmt: skip
