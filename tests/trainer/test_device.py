"""What the device cannot do is said before anything is loaded, by every command that would."""

import os

import pytest
import torch
import torch.utils.deterministic

from softgrpo.cli import parity, train
from softgrpo.config import Config, ConfigError
from softgrpo.learner.device import check_device, device_type, make_deterministic

NO_MODEL = "model.path=./nowhere"  # looking for it would be another error


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_float32_is_for_the_cpu():
    configs = {t: Config.load("demo", [f"model.dtype={t}"]) for t in ("float32", "bfloat16")}
    check_device(configs["float32"], "cpu")
    check_device(configs["bfloat16"], "cpu")
    check_device(configs["bfloat16"], "cuda")
    with pytest.raises(ConfigError, match=r"^model.dtype: .*set model.dtype=bfloat16") as error:
        check_device(configs["float32"], "cuda")
    assert "\n" not in str(error.value)


def test_deterministic_sums_leave_memory_as_it_is(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    make_deterministic()
    try:
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        del os.environ["CUBLAS_WORKSPACE_CONFIG"]


def test_the_device_is_the_gpu_where_there_is_one(gpu):
    assert device_type() == "cuda"


@pytest.mark.parametrize(
    ("command", "arguments"),
    [(train, ["--dry-run", "--config", "demo"]), (parity, ["demo"])],
)
def test_the_commands_refuse_it_before_they_look_for_a_model(command, arguments, gpu, capsys):
    try:
        status = command.main([*arguments, NO_MODEL, "model.dtype=float32"])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert ": error: model.dtype: float32 cannot be trained on a GPU" in said
