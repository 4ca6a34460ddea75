"""Several processes train as one does, and a lost one ends the job."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import tensors_of
from processes import exit_status, free_port, ranks, variables_of_ranks
from safetensors.torch import load_file
from simulated_gpu import found

from softgrpo import Config, Trainer
from softgrpo.cli.train import main
from softgrpo.config import ConfigError
from softgrpo.distributed import World

# Three prompts on two processes in minibatches of two: shares differ, and so small a pass splits
# groups over passes and processes.
OVERRIDES = ("algorithm.kl_coef=0.05", "optim.lr=1e-3", "checkpoint.every=2", "eval.samples=2")
OVERRIDES += ("optim.tokens_per_microbatch=45",)
CLOCK = ("time/", "step_time", "tokens_per_second")


@pytest.fixture
def device():
    """What this process sees; those that it starts may see simulated GPUs."""
    return torch.device("cpu")


def torchrun(*arguments, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += [f"--master-port={free_port()}", "-m", "softgrpo.train", *map(str, arguments)]
    return subprocess.Popen(command, start_new_session=True, **options)


def on_gpus(*arguments):
    """Two processes that each see simulated GPUs; gloo stands in for NCCL."""
    script = Path(__file__).parents[1] / "simulated_gpu" / "train.py"
    command = [sys.executable, str(script), *map(str, arguments)]
    return [subprocess.Popen(command, env=os.environ | rank) for rank in variables_of_ranks()]


def adapters_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def rows_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in rows]


def test_two_processes_train_as_one_and_continue_each_others_checkpoints(
    tiny_config, tiny_data, tmp_path
):
    common = ["--config", str(tiny_config), f"data.eval={tiny_data}", "data.eval_size=3"]
    common += OVERRIDES
    one, begun, ended = (tmp_path / "runs" / name for name in ("one", "begun", "ended"))
    # By torchrun itself, once.
    both = torchrun(*common, "run.name=begun", "run.max_steps=4")
    main([*common, "run.name=one"])
    main([*common, "run.name=ended", "run.max_steps=4"])
    assert both.wait(120) == 0
    main([*common, "run.name=begun", "run.resume=auto"])
    # As on two machines of one GPU each: the weights are on both.
    for process in ranks(*common, "run.name=ended", "run.resume=auto", machines=2):
        assert exit_status(process) == 0
    whole = tensors_of(one / "checkpoints" / "step_000006")
    for run in (begun, ended):
        tensors = tensors_of(run / "checkpoints" / "step_000006")
        assert tensors.keys() == whole.keys()
        for name, tensor in tensors.items():
            assert (tensor - whole[name]).abs().max() < 1e-5, name
        rows = [row for row in rows_of(run) if "reward" in row]
        expected = [row for row in rows_of(one) if "reward" in row]
        assert len(rows) == len(expected) == 6
        for row, other in zip(rows, expected, strict=True):
            assert row == pytest.approx(other, abs=1e-4)
        assert (run / "model" / "model.safetensors").exists()
        assert (run / "report.html").exists()
    files = os.listdir(begun / "checkpoints" / "step_000004")
    assert {"__0_0.distcp", "__1_0.distcp"} <= set(files)
    first, other = (next(r for r in rows_of(run) if "eval/mean@2" in r) for run in (begun, one))
    assert first == other


def test_two_gpus_train_as_one_cpu(tiny_config, tmp_path):
    """A GPU for each process: FSDP's streams, collectives on the device, statistics that come from
    another device than one's own, checkpoints."""
    if found.SIMULATED is None:
        pytest.skip(str(found.WHY_NOT))
    # A pass has room for one sample of a full response: of three samples, one of four is idle.
    one_a_pass = ("rollout.group_size=3", "optim.tokens_per_microbatch=21")
    common = ["--config", str(tiny_config), *OVERRIDES, *one_a_pass, "run.max_steps=2"]
    gpus = on_gpus(*common, "run.name=gpus")
    main([*common, "run.name=one"])
    assert [process.wait(240) for process in gpus] == [0, 0]
    one, two = (tmp_path / "runs" / name for name in ("one", "gpus"))
    for row, other in zip(rows_of(two), rows_of(one), strict=True):
        assert row == pytest.approx(other, abs=1e-4)
    tensors, whole = (tensors_of(run / "checkpoints" / "step_000002") for run in (two, one))
    for name, tensor in tensors.items():
        # Adam makes a step of full size of a rounding where the gradient is 0.
        assert ((tensor - whole[name]).abs() > 2e-5).float().mean() < 0.01, name


def test_two_processes_train_adapters_and_sample_ahead_as_one_does(tiny_config, tmp_path):
    pytest.importorskip("peft")
    # A rank that two processes cannot share equally.
    common = ["--config", str(tiny_config), *OVERRIDES, "lora.rank=3", "run.max_steps=4"]
    common += ["rollout.ahead=1", "algorithm.correction.mode=truncate"]
    one, two = (tmp_path / "runs" / name for name in ("one", "two"))
    both = ranks(*common, "run.name=two")
    main([*common, "run.name=one"])
    assert [exit_status(process) for process in both] == [0, 0]
    for read, part in ((tensors_of, "checkpoints/step_000004"), (adapters_of, "adapter")):
        tensors, expected = read(two / part), read(one / part)
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            assert (tensor - expected[name]).abs().max() < 1e-5, name
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    assert rows_of(two)[-1] == pytest.approx(rows_of(one)[-1], abs=1e-4)
    assert rows_of(two)[-1]["sampling/weight_lag"] == 2
    assert (two / "model" / "model.safetensors").exists()


def deadly_reward(folder, number):
    """Gives process 1 the signal at its first call after the second step is saved."""
    path, saved = folder / "deadly.py", folder / "runs" / "tiny" / "checkpoints" / "step_000002"
    path.write_text(
        "import os, pathlib\n"
        "def deadly(prompts, completions, **columns):\n"
        f"    saved = pathlib.Path({str(saved)!r}).exists()\n"
        "    if saved and os.environ.get('RANK') == '1':\n"
        f"        os.kill(os.getppid(), {int(number)})\n"
        "    return [float(i % 2) for i in range(len(completions))]\n"
    )
    return f"reward.functions=[{{path: '{path}:deadly'}}]"


LOST = "softgrpo-train: error: process 0 lost contact with another one ("


def check_lost(said, run):
    assert said.startswith(LOST)
    assert "run.resume=auto continues from the last checkpoint" in said
    assert "step_000002" in [path.name for path in (run / "checkpoints").iterdir()]


def test_a_killed_process_ends_the_job_with_one_line(tiny_config, tmp_path):
    job = torchrun(
        "--config", tiny_config, deadly_reward(tmp_path, signal.SIGKILL), "run.timeout_s=3",
        "run.max_steps=1000", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    _, errors = job.communicate(timeout=120)
    assert job.returncode != 0
    (said,) = [line for line in errors.splitlines() if LOST in line]
    check_lost(said, tmp_path / "runs" / "tiny")
    assert "softgrpo/" not in errors  # no traceback of ours


def test_a_hung_process_ends_the_other_with_one_line(tiny_config, tmp_path):
    arguments = (deadly_reward(tmp_path, signal.SIGSTOP), "run.timeout_s=3", "run.max_steps=1000")
    first, hung = ranks("--config", tiny_config, *arguments, output=tmp_path / "said")
    assert exit_status(first) > 0
    hung.kill()
    (said,) = [x for x in (tmp_path / "said").read_text().splitlines() if LOST in x]
    check_lost(said, tmp_path / "runs" / "tiny")


def test_shares_are_a_partition_in_order():
    for size in (1, 2, 3, 8):
        parts = [World(rank, size).share(range(11)) for rank in range(size)]
        assert [item for part in parts for item in part] == list(range(11))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(ConfigError, match=r"prompts_per_step=4 is fewer than the 8 processes"):
        World(0, 8).check_shares("rollout.prompts_per_step", 4)


def test_lost_rewards_of_all_processes_are_told(tiny_config, capsys):
    class Another(World):
        """A second process, which has lost the rewards of three samples."""

        def gather(self, value):
            return [value, 3] if isinstance(value, int) else [value]

    trainer = Trainer(Config.load(tiny_config))
    trainer.world = Another()
    trainer.step(1)
    trainer.rewards.close()
    assert "warning: rewards of 3 samples hung or crashed" in capsys.readouterr().out


def test_rewards_that_an_evaluation_lost_are_told_once(tiny_config, capsys):
    trainer = Trainer(Config.load(tiny_config, ["log.samples_every=0"]))
    trainer.rewards.lost = 2
    trainer.step(1), trainer.step(2)
    trainer.rewards.close()
    assert capsys.readouterr().out.count("rewards of 2 samples hung or crashed") == 1


def test_one_process_needs_no_torchrun(monkeypatch, tiny_config):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert World.join(Config.load(tiny_config).run.timeout_s) == World(0, 1, 1)
