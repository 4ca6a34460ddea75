"""One engine on the GPUs of several processes."""

import json

import pytest
import torch
from processes import exit_status, start, variables_of_ranks

from softgrpo import Config
from softgrpo.cli.train import main
from softgrpo.config import ConfigError
from softgrpo.distributed import World
from softgrpo.rollout.engines import make_engine

OVERRIDES = ("run.max_steps=3", "eval.every=2", "rollout.sleep=always", "optim.lr=1e-3")


@pytest.fixture
def device():
    """What this process sees."""
    return torch.device("cpu")


def rows_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "reward" in row]


def test_two_processes_with_one_engine_train_as_one_does(tiny_config, tiny_data, tmp_path):
    common = [
        "--config",
        str(tiny_config),
        f"data.eval={tiny_data}",
        "data.eval_size=3",
        *OVERRIDES,
    ]
    wide = [*common, "run.name=wide", "rollout.engine=wide", "rollout.tensor_parallel=2"]
    made = tmp_path / "made"
    both = [
        start("one_engine_of_two", *wide, environment=rank | {"MADE": str(made)})
        for rank in variables_of_ranks()
    ]
    main([*common, "run.name=one"])
    assert [exit_status(process) for process in both] == [0, 0]
    assert made.read_text() == '{"rank": "0", "gpus": 2}\n'
    found, expected = (rows_of(tmp_path / "runs" / name) for name in ("wide", "one"))
    assert len(found) == len(expected) == 3
    for row, other in zip(found, expected, strict=True):
        assert row["reward"] == other["reward"]
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_what_cannot_share_gpus_is_refused(tiny_config, monkeypatch):
    with pytest.raises(ConfigError, match="tensor_parallel=2 does not divide the 1 processes"):
        World.join(10.0, 2)
    for name, value in variables_of_ranks(machines=2)[0].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="tensor_parallel=2 does not divide the 1 processes"):
        World.join(10.0, 2)
    world = World(0, 4, 1, 2)
    assert [World(rank, 4, 1, 2).has_engine for rank in range(4)] == [True, False, True, False]
    assert world.engines == 2
    with pytest.raises(ConfigError, match="the engine 'native' runs on one GPU: take 'vllm'"):
        make_engine(Config.load(tiny_config), None, None, 8, 1, world)
