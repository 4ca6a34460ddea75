"""softgrpo-train from the outside: what it leaves, that it learns, resumes and refuses."""

import json
import shutil

import pytest
import torch
from checkpoints import tensors_of
from processes import exit_status, kill_in_the_middle, start
from simulated_gpu.found import REAL
from simulated_gpu.plugin import ON_THE_CPU
from transformers import AutoModelForCausalLM, AutoTokenizer

from softgrpo import Config, Trainer
from softgrpo.cli.train import main
from softgrpo_engine import LLM, SamplingParams

# What no two runs agree on: the clock.
CLOCK = ("time/", "step_time", "tokens_per_second")


def rows_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in rows]


def train(config, *overrides):
    assert main(["--engine", "native", "--config", str(config), *overrides]) == 0


def refused(capsys, config, *overrides):
    """The one line that a refused command prints."""
    with pytest.raises(SystemExit) as exit_info:
        main(["--config", str(config), *overrides])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    return message


def test_a_run_leaves_everything(tiny_config, tmp_path, tiny_data, rounding):
    train(tiny_config, f"data.eval={tiny_data}", "data.train=" + str(_other(tmp_path)))
    run = tmp_path / "runs" / "tiny"
    assert Config.load(run / "config.yaml").run.max_steps == 6
    rows = rows_of(run)
    steps = [row["step"] for row in rows if "reward" in row]
    assert steps == [1, 2, 3, 4, 5, 6]
    evaluations = [row for row in rows if "eval/mean@2" in row]
    assert [row["step"] for row in evaluations] == [0, 6]
    wanted = {
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "rewards/early_letters/mean",
        "completions/mean_length",
        "completions/clipped_ratio",
        "loss",
        "grad_norm",
        "learning_rate",
        "clip_ratio/region_mean",
        "sampling/sampling_logp_difference/mean",
        "sampling/importance_sampling_ratio/mean",
        "soft/effective_candidates",
        "soft/top_weight",
        "soft/kept_slots",
        "soft/length",
        "num_tokens",
    }
    assert wanted <= set(rows[1])
    # In fp32 the trainer computes what the engine drew from, at every step.
    differences = [r["sampling/sampling_logp_difference/max"] for r in rows if "reward" in r]
    assert max(differences) < rounding
    samples = [json.loads(line) for line in (run / "samples.jsonl").open()]
    soft = [p for s in samples for p in s["positions"] if p["kind"] == 1]
    assert soft
    assert all(abs(sum(w for _, w in p["candidates"]) - 1) < 5e-3 for p in soft)
    assert (run / "report.html").stat().st_size > 1000
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_000004", "step_000006"]
    _check_export(run / "model")


def _other(tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"tell {c}", "answer": c}) + "\n" for c in "abcdefgh")
    )
    return path


def _check_export(path):
    """transformers loads it, generation takes its soft settings, and both see the same weights."""
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer("say a")["input_ids"]
    greedy = theirs.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)
    llm = LLM(path, dtype="float32", kv_memory=0.01, max_batch_size=4)
    assert llm.default_soft is not None
    assert llm.default_soft.top_k == 5
    ours = llm.generate([ids], SamplingParams(temperature=0, max_tokens=8), False, progress=False)
    assert ours[0].samples[0].token_ids == greedy[0, len(ids) :].tolist()
    soft = llm.generate([ids], SamplingParams(max_tokens=4), progress=False)
    assert soft[0].samples[0].soft.kind[0] == 1


METHODS = {
    "exact": (),
    "censored": ("algorithm.objective=censored", "rollout.soft.weight_floor=0.1"),
    "dirichlet": (
        "rollout.soft.noise=dirichlet", "rollout.soft.noise_scale=5", "rollout.soft.tau=1",
    ),
    "gaussian": (
        "rollout.soft.noise=gaussian", "rollout.soft.noise_scale=0.2", "rollout.soft.tau=1",
    ),
    "multiplex": (
        "rollout.soft.noise=multiplex", "rollout.soft.noise_scale=3", "rollout.soft.tau=1",
        "algorithm.objective=slot_mean",
    ),
    "mixture of inputs": (
        "rollout.soft.noise=mixture_of_inputs", "rollout.soft.tau=1", "algorithm.objective=token",
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_it_learns(method, tiny_config, tmp_path, device):
    # Learning is the CPU's: a simulated GPU shows in three steps whether it computes the same.
    steps = 3 if device.type == "cuda" and not REAL else 25
    quick = (f"run.max_steps={steps}", "checkpoint.every=0", "checkpoint.export_hf=false")
    train(tiny_config, *quick, *METHODS[method])
    rows = rows_of(tmp_path / "runs" / "tiny")
    rewards = [row["reward"] for row in rows]
    assert steps == 3 or sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2
    ratios = [row.get("sampling/importance_sampling_ratio/mean", 1.0) for row in rows]
    assert ratios == pytest.approx([1.0] * len(rows), abs=0.05)


@ON_THE_CPU
@pytest.mark.parametrize("soft", ["true", "false"])
def test_killed_and_resumed_equals_uninterrupted(tiny_config, tmp_path, soft):
    """kill -9 in the middle, the same command again: same metrics, same weights, bit for bit."""
    common = (f"rollout.soft.enabled={soft}", "run.max_steps=12", "checkpoint.every=5")
    train(tiny_config, *common, "run.name=whole")
    runs = tmp_path / "runs"
    command = ("softgrpo.cli.train", "--config", tiny_config, *common)
    command += ("run.name=killed", "run.resume=auto")
    metrics = runs / "killed" / "metrics.jsonl"
    # After the checkpoint of step 5, before that of step 10.
    kill_in_the_middle(start(*command), metrics, '"reward"', 6)
    with metrics.open("a") as file:
        file.write('{"step": 13, "rew')  # what a kill in the middle of a write leaves
    assert exit_status(start(*command)) == 0
    assert rows_of(runs / "killed") == rows_of(runs / "whole")
    paths = [runs / r / "checkpoints" / "step_000012" for r in ("killed", "whole")]
    killed, whole = map(tensors_of, paths)
    assert killed.keys() == whole.keys()
    assert sum("exp_avg_sq" in key for key in whole) > 5
    assert all(torch.equal(killed[key], whole[key]) for key in whole)


def test_python_api_takes_a_closure(tiny_config, tmp_path):
    seen = []

    def reward(prompts, completions, answer, **columns):
        seen.append(len(completions))
        return [float(len(c)) for c in completions]

    config = Config.load(tiny_config, ["run.max_steps=1", "checkpoint.export_hf=false"])
    Trainer(config, reward_funcs=[reward]).train()
    assert seen == [12]
    assert "rewards/reward/mean" in rows_of(tmp_path / "runs" / "tiny")[0]


def test_kl_to_the_reference_starts_at_zero_and_grows(tiny_config, tmp_path):
    train(tiny_config, "algorithm.kl_coef=0.01", "optim.minibatch_prompts=null")
    kl = [row["kl"] for row in rows_of(tmp_path / "runs" / "tiny")]
    assert kl[0] < 1e-6 < 1e-4 < kl[-1]


BAD = {
    "misspelt key": (["rollout.soft.topk=3"], "rollout.soft.top_k"),
    "wrong type": (["optim.lr=fast"], "optim.lr"),
    "wrong engine": (["rollout.engine=nativ"], "native"),
    "missing file": (["data.train=nowhere.jsonl"], "nowhere.jsonl"),
    "missing column": (["data.prompt_key=question"], "prompt, answer"),
    "prompt too long": (["data.max_prompt_tokens=3"], "data.max_prompt_tokens"),
    "context too short": (["rollout.max_new_tokens=500"], "more than the model's 128"),
    "pass too small": (["optim.tokens_per_microbatch=12"], "is less than one sample"),
    "missing reward": (["reward.functions=[{path: softgrpo.rewards.maths}]"], "maths"),
    "missing model": (["model.path=./nowhere"], "nowhere"),
    "no checkpoint": (["run.resume=./nowhere"], "no checkpoint"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_no_run(case, tiny_config, tmp_path, capsys):
    overrides, expected = BAD[case]
    assert expected in refused(capsys, tiny_config, *overrides)
    assert not (tmp_path / "runs").exists()


def test_unsupported_architecture(tiny_config, tiny_model, tmp_path, capsys):
    model = tmp_path / "gpt2"
    model.mkdir()
    for file in tiny_model.iterdir():
        (model / file.name).symlink_to(file)
    (model / "config.json").unlink()
    values = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 32}
    (model / "config.json").write_text(json.dumps(values))
    message = refused(capsys, tiny_config, f"model.path={model}")
    assert "GPT2LMHeadModel" in message
    assert "LlamaForCausalLM" in message


@pytest.mark.parametrize(
    ("body", "expected"),
    [("raise KeyError('colour')", "colour"), ("return [1.0]", "4 completions")],
)
def test_a_bad_reward_names_itself(tiny_config, tmp_path, capsys, body, expected):
    path = tmp_path / "bad.py"
    path.write_text(f"def bad_reward(prompts, completions, **columns):\n    {body}\n")
    message = refused(capsys, tiny_config, f'reward.functions=[{{path: "{path}:bad_reward"}}]')
    assert "bad_reward" in message
    assert expected in message


def test_nan_weights_are_told_in_one_line(tiny_config, tiny_model, tmp_path, capsys):
    theirs = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        theirs.model.norm.weight[0] = float("nan")
    theirs.save_pretrained(tmp_path / "nan")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "nan")
    capsys.readouterr()  # the progress bars of transformers
    assert "not finite" in refused(capsys, tiny_config, f"model.path={tmp_path / 'nan'}")


def test_a_second_run_does_not_overwrite_the_first(tiny_config, tmp_path, capsys):
    train(tiny_config, "run.max_steps=1")
    before = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_bytes()
    assert "run.resume=auto" in refused(capsys, tiny_config, "run.max_steps=1")
    other_lr = refused(capsys, tiny_config, "run.resume=auto", "optim.lr=1e-4")
    assert "optim.lr was 0.003" in other_lr
    assert (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_bytes() == before
    # What changes no bit may change, here what an update leaves of the engine's memory.
    train(tiny_config, "run.resume=auto", "run.max_steps=2", "rollout.sleep=always")
    assert [row["step"] for row in rows_of(tmp_path / "runs" / "tiny")] == [1, 2]


def test_a_branch_needs_a_name_of_its_own(tiny_config, tmp_path, capsys):
    """Else `auto` would go on from the checkpoints that the branch has left behind."""
    train(tiny_config, "run.max_steps=2", "checkpoint.every=1")
    run = tmp_path / "runs" / "tiny"
    before = (run / "metrics.jsonl").read_bytes()
    branch = f"run.resume={run / 'checkpoints' / 'step_000001'}", "optim.lr=1e-4"
    assert "another run.name" in refused(capsys, tiny_config, *branch)
    assert (run / "metrics.jsonl").read_bytes() == before
    train(tiny_config, *branch, "run.name=branch", "run.max_steps=2")
    assert [row["step"] for row in rows_of(run.parent / "branch")] == [2]
    # Killed before its first checkpoint, it has nothing to continue from but that of another run.
    shutil.rmtree(run.parent / "branch" / "checkpoints")
    again = refused(capsys, tiny_config, "run.name=branch", "run.resume=auto", "optim.lr=1e-4")
    assert "began from" in again
