"""Metrics on their way to TensorBoard, W&B and trackio."""

import math
import sys
from types import SimpleNamespace

import pytest

from softgrpo.config.schema import ConfigError
from softgrpo.log.tracking import Tracking

ROWS = [
    {"step": 1, "reward": 0.25, "loss": math.nan},
    {"step": 2, "reward": 0.5},
    {"step": 2, "eval/mean@8": 0.75},
]


def test_tensorboard_writes_an_event_file_and_a_resume_replaces_later_steps(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def run(rows, first_step):
        tracking = Tracking(["tensorboard"])
        tracking.start(tmp_path, "run", {"optim": {"lr": 1}}, first_step)
        for row in rows:
            tracking.log(row)
        tracking.close()

    run(ROWS, 1)
    run([{"step": 2, "reward": 0.125}], 2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 0.25), (2, 0.125)]
    assert events.Scalars("eval/mean@8") == []
    assert "loss" not in events.Tags()["scalars"]  # it was NaN


@pytest.mark.parametrize("service", ["wandb", "trackio"])
def test_services_of_wandb_s_interface(service, tmp_path, monkeypatch):
    calls = []
    module = SimpleNamespace(
        init=lambda **options: calls.append(("init", options)),
        log=lambda values, step: calls.append(("log", step, values)),
        finish=lambda: calls.append(("finish",)),
    )
    monkeypatch.setitem(sys.modules, service, module)
    monkeypatch.setenv(f"{service.upper()}_PROJECT", "ours")
    tracking = Tracking([service])
    tracking.start(tmp_path, "demo", {"optim": {"lr": 1}}, 1)
    for row in ROWS:
        tracking.log(row)
    tracking.close()
    options = {"project": "ours", "name": "demo", "group": "demo", "config": {"optim": {"lr": 1}}}
    assert calls == [
        ("init", options),
        ("log", 1, {"reward": 0.25}),
        ("log", 2, {"reward": 0.5}),
        ("log", 2, {"eval/mean@8": 0.75}),
        ("finish",),
    ]


@pytest.mark.parametrize("service", ["tensorboard", "wandb", "trackio"])
def test_a_missing_library_is_named(service, monkeypatch):
    module = "torch.utils.tensorboard" if service == "tensorboard" else service
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"{service} cannot be used .*: pip install {service}"):
        Tracking([service])
