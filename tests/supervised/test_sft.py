"""softgrpo-sft from the outside: what it leaves, that it learns, resumes and refuses."""

import json

import pytest
import torch
from checkpoints import tensors_of
from processes import exit_status, kill_in_the_middle, start
from simulated_gpu.found import REAL
from simulated_gpu.plugin import ON_THE_CPU
from transformers import AutoModelForCausalLM

from softgrpo.cli.generate import main as generate
from softgrpo.cli.sft import main
from softgrpo.config import SupervisedConfig
from softgrpo_engine import LLM, SamplingParams, SoftParams

CLOCK = ("step_time", "tokens_per_second")


@pytest.fixture
def data(tmp_path):
    """A mapping of 20 words, with a thought between: n(i) -> a mixture, then n(7i + 3), the end."""
    path = tmp_path / "train.jsonl"
    rows = [
        {
            "prompt": f"n{i}",
            "target": [{f"n{i}": 3, f"n{(i + 1) % 20}": 1}, f"n{(7 * i + 3) % 20}", "</s>"],
        }
        for i in range(20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(tmp_path, unwritten_model, data, device, request):
    """A YAML file of a run that takes a second or two, on the CPU and on a GPU."""
    dtype = "float32"
    if device.type == "cuda" and REAL:
        dtype = "bfloat16"  # flash attention takes no float32
    elif device.type == "cuda":
        request.getfixturevalue("float32_attention")
    path = tmp_path / "sft.yaml"
    path.write_text(
        f"""
run: {{name: tiny, output_dir: {tmp_path}/runs, max_steps: 12, seed: 3}}
model: {{path: {unwritten_model}, from_scratch: true, dtype: {dtype}}}
data: {{train: {data}, batch_size: 8}}
optim: {{lr: 1e-2, weight_decay: 0, tokens_per_microbatch: 20}}
checkpoint: {{every: 5, export_hf: false}}
"""
    )
    return path


def sft(config, *overrides):
    assert main(["--config", str(config), *overrides]) == 0


def rows_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


def test_a_run_leaves_everything(config, tmp_path):
    sft(config)
    run = tmp_path / "runs" / "tiny"
    assert SupervisedConfig.load(run / "config.yaml").data.batch_size == 8
    rows = rows_of(run)
    assert [row["step"] for row in rows] == list(range(1, 13))
    wanted = {"loss", "target_entropy", "accuracy", "grad_norm", "learning_rate", "epoch"}
    assert all(wanted <= set(row) for row in rows)
    assert rows[-1]["num_tokens"] == 12 * 8 * 4  # prompt, arrow, thought, answer
    # Of each row's three positions, one is a mixture of weights 3/4 and 1/4.
    entropy = -(0.75 * torch.tensor(0.75).log() + 0.25 * torch.tensor(0.25).log()) / 3
    assert rows[0]["target_entropy"] == pytest.approx(float(entropy), rel=1e-5)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_000010", "step_000012"]
    assert not (run / "model").exists()


@ON_THE_CPU
def test_from_scratch_it_learns_a_mapping_and_what_it_leaves_generates(
    config, tmp_path, unwritten_model, capsys
):
    sft(config, "run.max_steps=150", "optim.schedule=cosine", "checkpoint.export_hf=true")
    run = tmp_path / "runs" / "tiny"
    last = rows_of(run)[-1]
    assert last["accuracy"] == 1.0
    assert last["loss"] < last["target_entropy"] + 0.05
    assert not list(unwritten_model.glob("*.safetensors"))
    # transformers and the engine load it.
    assert AutoModelForCausalLM.from_pretrained(run / "model").config.vocab_size == 23
    # With the probabilities themselves as weights, the engine reads the mixtures of the data.
    soft = SoftParams(top_k=2, top_p=1.0, tau=1.0, noise="none", max_soft_tokens=1)
    llm = LLM(run / "model", kv_memory=0.01, max_batch_size=20)
    params = SamplingParams(temperature=0, max_tokens=3)
    outputs = llm.generate([[3 + i, 2] for i in range(20)], params, soft, progress=False)
    samples = [output.samples[0] for output in outputs]
    answers = [[3 + i, 3 + (7 * i + 3) % 20, 1] for i in range(20)]
    assert [sample.token_ids for sample in samples] == answers
    assert [s.soft.ids[0].tolist() for s in samples] == [[3 + i, 3 + (i + 1) % 20]
                                                         for i in range(20)]  # fmt: skip
    capsys.readouterr()
    generate([str(run / "model"), "--prompt", "n4", "--temperature", "0", "--max-tokens", "3"])
    assert capsys.readouterr().out.split()[0] == "n4"


@ON_THE_CPU
def test_passes_do_not_change_the_step(config, tmp_path):
    """Passes of a few tokens, which hold different numbers of trained positions, and one pass."""
    mixed = tmp_path / "mixed.jsonl"
    rows = [{"prompt_ids": [3], "target": [4 + j for j in range(i + 1)]} for i in range(8)]
    mixed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ("run.max_steps=1", "checkpoint.every=0", f"data.train={mixed}")
    sft(config, *common, "run.name=few", "optim.tokens_per_microbatch=9")
    sft(config, *common, "run.name=all", "optim.tokens_per_microbatch=1000")
    (few,), (whole,) = (rows_of(tmp_path / "runs" / name) for name in ("few", "all"))
    assert few == pytest.approx(whole, rel=1e-5)


@ON_THE_CPU
def test_killed_and_resumed_equals_uninterrupted(config, tmp_path):
    """kill -9 in the middle, the same command again: same metrics, same weights, bit for bit."""
    common = ("run.max_steps=200", "checkpoint.every=75")
    sft(config, *common, "run.name=whole")
    runs = tmp_path / "runs"
    command = ("softgrpo.cli.sft", "--config", config, *common)
    command += ("run.name=killed", "run.resume=auto")
    metrics = runs / "killed" / "metrics.jsonl"
    # After the checkpoint of step 75, before that of step 150.
    kill_in_the_middle(start(*command), metrics, '"loss"', 80)
    assert metrics.read_text().count('"loss"') < 200
    assert exit_status(start(*command, output=tmp_path / "said")) == 0
    assert "continuing after step" in (tmp_path / "said").read_text()
    assert rows_of(runs / "killed") == rows_of(runs / "whole")
    paths = [runs / name / "checkpoints" / "step_000200" for name in ("killed", "whole")]
    killed, whole = map(tensors_of, paths)
    assert killed.keys() == whole.keys()
    assert sum("exp_avg_sq" in key for key in whole) > 5
    assert all(torch.equal(killed[key], whole[key]) for key in whole)


@ON_THE_CPU
def test_a_model_of_its_own_is_the_beginning_of_another_run(config, tmp_path):
    """Weights on disk are what the next run begins with, unless it asks for new ones."""
    sft(config, "checkpoint.export_hf=true")
    last = rows_of(tmp_path / "runs" / "tiny")[-1]["loss"]
    again = (f"model.path={tmp_path}/runs/tiny/model", "run.max_steps=1", "checkpoint.every=0")
    sft(config, *again, "run.name=on", "model.from_scratch=false")
    sft(config, *again, "run.name=anew")
    assert rows_of(tmp_path / "runs" / "on")[0]["loss"] < last + 0.2
    first = rows_of(tmp_path / "runs" / "tiny")[0]
    assert rows_of(tmp_path / "runs" / "anew")[0]["loss"] == first["loss"]
    sft(config, *again, "run.name=other", "run.seed=4", "data.shuffle=false")
    assert rows_of(tmp_path / "runs" / "other")[0]["loss"] != first["loss"]


BAD = {
    "misspelt key": (["data.batchsize=3"], "data.batch_size"),
    "key of reinforcement learning": (["rollout.group_size=3"], "unknown section 'rollout'"),
    "no data": (["data.train="], "data.train is not set"),
    "missing file": (["data.train=nowhere.jsonl"], "nowhere.jsonl"),
    "row too long": (["data.max_tokens=4"], "row 0: prompt and target have 5 tokens"),
    "weights that are not there": (["model.from_scratch=false"], "no *.safetensors"),
    "name of no folder": (["run.name=a/b"], "run.name"),
    "betas": (["optim.betas=[0.9, 1.0]"], "optim.betas"),
    "no checkpoint": (["run.resume=./nowhere"], "no checkpoint"),
}


@ON_THE_CPU
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_no_run(case, config, tmp_path, capsys):
    overrides, expected = BAD[case]
    message = refused(capsys, config, *overrides)
    assert expected in message
    assert not (tmp_path / "runs").exists()


@ON_THE_CPU
def test_a_second_run_and_other_settings_are_refused(config, tmp_path, capsys):
    sft(config, "run.max_steps=1")
    assert "already holds a run" in refused(capsys, config)
    message = refused(capsys, config, "run.resume=auto", "optim.lr=1")
    assert "optim.lr was 0.01" in message


@ON_THE_CPU
def test_several_processes_are_refused(config, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in refused(capsys, config)


@ON_THE_CPU
def test_a_loss_that_is_not_finite_stops_the_run(config, capsys):
    assert "gradient norm of step" in refused(capsys, config, "optim.lr=1e30")


def refused(capsys, config, *overrides):
    """The one line that a refused command prints."""
    with pytest.raises(SystemExit) as exit_info:
        main(["--config", str(config), *overrides])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    return message
