"""What goes wrong in a long run: nothing is lost, and one line says what it was."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from checkpoints import tensors_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from softgrpo import Config, Trainer
from softgrpo.cli.train import main
from softgrpo.run import checkpoint
from softgrpo.run import folder as run_folder
from softgrpo.run.interrupt import Interrupted


@pytest.fixture
def device():
    """Processes, signals and disks are those of the host."""
    return torch.device("cpu")


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def load(tiny_config, *overrides):
    return Config.load(tiny_config, ["checkpoint.export_hf=false", *overrides])


def refused(capsys, config, *overrides):
    """The one line that a refused command prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main(["--config", str(config), "checkpoint.export_hf=false", *overrides])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    return message


def letters(prompts, completions, **columns):
    return [float(sum("a" <= x <= "m" for x in text)) for text in completions]


def test_a_signal_saves_after_the_step_and_the_run_goes_on_as_if_it_had_not_been(
    tiny_config, tmp_path
):
    """In the middle of step 3, between two checkpoints."""
    calls = []

    def interrupted(prompts, completions, **columns):
        calls.append(len(completions))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return letters(prompts, completions)

    never = ("run.max_steps=5", "checkpoint.every=0")
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=r"SIGTERM: saved after step 3 of 5; run.resume=auto"):
        Trainer(load(tiny_config, *never), interrupted).train()
    assert signal.getsignal(signal.SIGTERM) is handler
    run = tmp_path / "runs" / "tiny"
    assert [row["step"] for row in rows_of(run)] == [1, 2, 3]
    assert "step_000003" in os.listdir(run / "checkpoints")
    assert (run / "report.html").exists()
    Trainer(load(tiny_config, *never, "run.resume=auto"), letters).train()
    Trainer(load(tiny_config, *never, "run.name=whole"), letters).train()
    last = "checkpoints/step_000005"
    ours, theirs = tensors_of(run / last), tensors_of(tmp_path / "runs" / "whole" / last)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture
def ctrl_c():
    """Ctrl-C does what it does in a terminal, also where the tests run as a background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_ends_at_once(tiny_config, ctrl_c):
    def twice(prompts, completions, **columns):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("still there")

    with pytest.raises(KeyboardInterrupt) as stop:
        Trainer(load(tiny_config), twice).train()
    assert not isinstance(stop.value, Interrupted)


def test_an_ignored_signal_stays_ignored(tiny_config, ctrl_c):
    def once(prompts, completions, **columns):
        signal.raise_signal(signal.SIGINT)
        return letters(prompts, completions)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Trainer(load(tiny_config, "run.max_steps=1"), once).train()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_ctrl_c_on_the_command_is_one_line(tiny_config, tmp_path, ctrl_c):
    command = [sys.executable, "-m", "softgrpo.cli.train", "--config", str(tiny_config)]
    command += ["run.max_steps=1000", "checkpoint.every=0", "log.samples_every=0"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    metrics, deadline = tmp_path / "runs" / "tiny" / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    said = [line for line in errors.splitlines() if "SIGINT" in line]
    assert said[0] == "SIGINT: saving after this step; again: ending at once"
    step = rows_of(tmp_path / "runs" / "tiny")[-1]["step"]
    assert said[1].startswith(f"softgrpo-train: SIGINT: saved after step {step} of 1000")
    assert "Traceback" not in errors
    assert os.listdir(metrics.parent / "checkpoints") == [f"step_{step:06d}"]


@pytest.mark.parametrize("what", ["weights", "metrics"])
def test_a_full_disk(what, tiny_config, tmp_path, capsys, monkeypatch):
    """From step 4 on nothing can be written: the checkpoint of step 2 is what there is."""
    run = tmp_path / "runs" / "tiny"
    write_data, real_open = checkpoint.FileSystemWriter.write_data, run_folder.Path.open

    def write(writer, *args):
        if "000004" in str(writer.path):
            (writer.path / "__0_0.distcp").write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_data(writer, *args)

    def open_(path, *args, **options):
        appended = path.name == "metrics.jsonl" and "a" in args and path.exists()
        if appended and path.read_text().count("\n") == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_open(path, *args, **options)

    with monkeypatch.context() as full:
        if what == "weights":
            full.setattr(checkpoint.FileSystemWriter, "write_data", write)
        else:
            full.setattr(run_folder.Path, "open", open_)
        message = refused(capsys, tiny_config)
    named = "the checkpoint" if what == "weights" else str(run / "metrics.jsonl")
    assert f"cannot write {named}: " in message
    assert "No space left on device" in message
    assert "run.resume=auto" in message
    folder = run_folder.RunFolder(run)
    assert folder.latest_step() == 2
    assert main(["--config", str(tiny_config), "run.resume=auto"]) == 0
    assert [row["step"] for row in rows_of(run)] == [1, 2, 3, 4, 5, 6]
    assert folder.checkpoint_steps() == [4, 6]


DAMAGE = {
    "cut": lambda path: os.truncate(path / "__0_0.distcp", 1000),
    "gone": lambda path: (path / "__0_0.distcp").unlink(),
    "no metadata": lambda path: (path / ".metadata").unlink(),
    "half of the metadata": lambda path: os.truncate(path / ".metadata", 1000),
    "garbled": lambda path: (path / "state.json").write_text('{"step": '),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, tiny_config, tmp_path, capsys):
    Trainer(load(tiny_config), letters).train()
    run = tmp_path / "runs" / "tiny"
    last = run / "checkpoints" / "step_000006"
    before = tensors_of(last)
    DAMAGE[damage](last)
    Trainer(load(tiny_config, "run.resume=auto"), letters).train()
    shown = capsys.readouterr().out
    assert f"warning: checkpoint {last} is damaged" in shown
    assert "continuing after step 4" in shown
    assert [row["step"] for row in rows_of(run)] == [1, 2, 3, 4, 5, 6]
    names = sorted(os.listdir(run / "checkpoints"))
    assert names == ["damaged_step_000006", "step_000004", "step_000006"]
    after = tensors_of(last)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_no_checkpoint_that_can_be_read_is_an_error_and_touches_nothing(
    tiny_config, tmp_path, capsys
):
    main(["--config", str(tiny_config), "checkpoint.export_hf=false"])
    run = tmp_path / "runs" / "tiny"
    for path in (run / "checkpoints").iterdir():
        DAMAGE["cut"](path)
    before = (run / "metrics.jsonl").read_bytes()
    assert "no checkpoint can be read" in refused(capsys, tiny_config, "run.resume=auto")
    assert (run / "metrics.jsonl").read_bytes() == before
    assert sorted(os.listdir(run / "checkpoints")) == ["step_000004", "step_000006"]


def test_a_gradient_that_is_not_finite_changes_no_weight(tiny_config, tmp_path):
    trainer = Trainer(load(tiny_config, "run.max_steps=1"), letters)
    weights = {n: p.detach().clone() for n, p in trainer.policy.decoder.named_parameters()}
    trainer.policy.decoder.model.norm.weight.register_hook(lambda grad: grad * torch.nan)
    with pytest.raises(FloatingPointError, match="the gradient norm is nan"):
        trainer.train()
    after = dict(trainer.policy.decoder.named_parameters())
    assert all(torch.equal(after[name], weights[name]) for name in weights)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_named(value, tiny_config):
    def odd(prompts, completions, **columns):
        return [value] * len(completions)

    with pytest.raises(ValueError, match=f"'odd' returned {value} for completion"):
        Trainer(load(tiny_config), odd).train()


def test_equal_rewards_teach_nothing(tiny_config, tmp_path):
    trainer = Trainer(load(tiny_config, "run.max_steps=2"), lambda completions, **_: [1.0] * 12)
    weights = {n: p.detach().clone() for n, p in trainer.policy.decoder.named_parameters()}
    trainer.train()
    after = dict(trainer.policy.decoder.named_parameters())
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    for row in rows_of(tmp_path / "runs" / "tiny"):
        assert row["frac_reward_zero_std"] == 1.0
        assert row["loss"] == row["grad_norm"] == 0.0


def test_empty_responses_are_rewarded_and_learnt_from(tiny_config, tiny_model, tmp_path):
    """A model whose every token ends the response."""
    path, seen = tmp_path / "mute", []
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    model.save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokenizer.get_vocab())})
    tokenizer.save_pretrained(path)

    def by_place(prompts, completions, **columns):
        seen.extend(completions)
        return [float(i % 4) for i in range(len(completions))]

    Trainer(load(tiny_config, f"model.path={path}", "run.max_steps=2"), by_place).train()
    assert set(seen) == {""}
    for row in rows_of(tmp_path / "runs" / "tiny"):
        assert row["completions/max_length"] == 1.0
        assert row["grad_norm"] > 0


def test_a_reward_that_hangs_or_crashes_costs_its_samples_alone(tiny_config, tmp_path, capsys):
    path = tmp_path / "bad.py"
    path.write_text(
        "import os, time\n"
        "def unreliable(prompts, completions, **columns):\n"
        "    for prompt in prompts:\n"
        f"        if prompt == {'say ' + 'a'!r}:\n"
        "            time.sleep(1000)\n"
        f"        if prompt == {'say ' + 'b'!r}:\n"
        "            os._exit(3)\n"
        "    return [len(set(c)) for c in completions]\n"
    )
    data = tmp_path / "three.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"say {c}", "answer": c}) + "\n" for c in "abc"))
    functions = f'reward.functions=[{{path: "{path}:unreliable"}}]'
    settings = (f"data.train={data}", functions, "reward.timeout_s=0.3", "run.max_steps=1")
    Trainer(load(tiny_config, *settings)).train()
    (row,) = rows_of(tmp_path / "runs" / "tiny")
    assert row["reward"] > 1
    assert row["grad_norm"] > 0
    assert row["frac_reward_zero_std"] == pytest.approx(2 / 3)
    assert "warning: rewards of 8 samples hung or crashed: none" in capsys.readouterr().out
