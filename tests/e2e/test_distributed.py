"""Several processes train as one does, and a lost one ends the job."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import tensors_of
from safetensors.torch import load_file
from simulated_gpu import found

from softgrpo import Config, Trainer
from softgrpo.cli.train import main
from softgrpo.config import ConfigError
from softgrpo.distributed import World
from softgrpo.learner.microbatches import balanced

# Three prompts on two processes in minibatches of two: shares differ, and a pass is empty.
OVERRIDES = ("algorithm.kl_coef=0.05", "optim.lr=1e-3", "checkpoint.every=2", "eval.samples=2")
CLOCK = ("time/", "step_time", "tokens_per_second")


@pytest.fixture
def device():
    """What this process sees; those that it starts may see simulated GPUs."""
    return torch.device("cpu")


def torchrun(*arguments, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += [f"--master-port={free_port()}", "-m", "softgrpo.train", *map(str, arguments)]
    return subprocess.Popen(command, start_new_session=True, **options)


def on_gpus(count, *arguments):
    """Processes that each see simulated GPUs; gloo stands in for NCCL."""
    script = Path(__file__).parents[1] / "simulated_gpu" / "train.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    command += [f"--master-port={free_port()}", str(script), *map(str, arguments)]
    return subprocess.Popen(command, start_new_session=True)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def two_nodes(*arguments):
    """Two processes as on two machines of one GPU each: the weights are on both."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "softgrpo.train", *map(str, arguments)]
    return [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank)}) for rank in (0, 1)
    ]


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
    both = torchrun(*common, "run.name=begun", "run.max_steps=4")
    main([*common, "run.name=one"])
    main([*common, "run.name=ended", "run.max_steps=4"])
    assert both.wait(120) == 0
    main([*common, "run.name=begun", "run.resume=auto"])
    for process in two_nodes(*common, "run.name=ended", "run.resume=auto"):
        assert process.wait(120) == 0
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
    common = ["--config", str(tiny_config), *OVERRIDES, "run.max_steps=2"]
    gpus = on_gpus(2, *common, "run.name=gpus")
    main([*common, "run.name=one"])
    assert gpus.wait(240) == 0
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
    both = torchrun(*common, "run.name=two")
    main([*common, "run.name=one"])
    assert both.wait(120) == 0
    for read, part in ((tensors_of, "checkpoints/step_000004"), (adapters_of, "adapter")):
        tensors, expected = read(two / part), read(one / part)
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            assert (tensor - expected[name]).abs().max() < 1e-5, name
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    assert rows_of(two)[-1] == pytest.approx(rows_of(one)[-1], abs=1e-4)
    assert rows_of(two)[-1]["sampling/weight_lag"] == 2
    assert (two / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_a_lost_process_ends_the_job_with_one_line(number, tiny_config, tmp_path):
    reward = tmp_path / "deadly.py"
    saved = tmp_path / "runs" / "tiny" / "checkpoints" / "step_000002"
    reward.write_text(
        "import os, pathlib\n"
        "def deadly(prompts, completions, **columns):\n"
        f"    saved = pathlib.Path({str(saved)!r}).exists()\n"
        "    if saved and os.environ.get('RANK') == '1':\n"
        f"        pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getppid()))\n"
        f"        os.kill(os.getppid(), {int(number)})\n"
        "    return [float(i % 2) for i in range(len(completions))]\n"
    )
    job = torchrun(
        "--config", tiny_config, f"reward.functions=[{{path: '{reward}:deadly'}}]",
        "run.timeout_s=3", "run.max_steps=1000",
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        said = ""
        while "lost contact" not in said:
            assert time.monotonic() < deadline
            said = job.stderr.readline()
        assert said.startswith("softgrpo-train: error: process 0 lost contact with another one (")
        assert "run.resume=auto continues from the last checkpoint" in said
        if number == signal.SIGKILL:
            assert job.wait(30) != 0
            assert "softgrpo/" not in job.stderr.read()  # no traceback of ours
    finally:
        with contextlib.suppress(ProcessLookupError):
            # torchrun's processes have sessions of their own.
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
        job.wait(60)
    assert saved.exists()


def test_every_process_has_as_many_passes_within_the_budget():
    tokens = [50, 10, 30, 20, 70, 5, 5, 60, 40]
    for ranks in (1, 2, 4):
        for budget in (70, 100, 1000):
            passes = balanced(tokens, budget, ranks)
            assert len(passes) % ranks == 0
            assert sorted(group for part in passes for group in part) == list(range(len(tokens)))
            assert all(sum(tokens[g] for g in part) <= budget for part in passes)
    # No more passes than needed, and none much longer than another.
    sizes = [sum(tokens[g] for g in part) for part in balanced(tokens, 80, 2)]
    assert len(sizes) == 4
    assert max(sizes) - min(sizes) <= 10
    # A group over the budget is computed by itself.
    assert [0] in balanced([500, 10, 10], 100, 1)
    assert balanced([10], 100, 4).count([]) == 3


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


def test_one_process_needs_no_torchrun(monkeypatch, tiny_config):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert World.join(Config.load(tiny_config).run.timeout_s) == World(0, 1, 1)
