"""The options of the algorithm in whole runs: what only the loop can get wrong."""

import json
from importlib.resources import files

import pytest
from simulated_gpu.plugin import ON_THE_CPU

from softgrpo import Config, Trainer
from softgrpo.cli.train import main
from softgrpo.data.training import TrainingData

QUICK = ["checkpoint.export_hf=false", "log.samples_every=0"]


def train(tiny_config, overrides, reward):
    config = Config.load(tiny_config, [*QUICK, *overrides])
    folder = Trainer(config, reward_funcs=[reward]).train()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def text(completion):
    return completion if isinstance(completion, str) else completion[0]["content"]


class Picky:
    """Tells the samples of prompts a to h apart by their length; the others all get 0."""

    __name__ = "picky"

    def __init__(self):
        self.asked = []

    def __call__(self, prompts, completions, **columns):
        self.asked += prompts[::4]  # one a group
        letters = [sum(x in "abcdefgh" for x in text(c)) for c in completions]
        return [n * (p[-1] <= "h") for n, p in zip(letters, prompts, strict=True)]


# Which groups are drawn and chosen is the host's work.
@ON_THE_CPU
def test_dynamic_sampling_refills_the_batch_up_to_the_limit(tiny_config):
    rounds = ["algorithm.dynamic_sampling_rounds=3", "run.max_steps=4"]
    reward = Picky()
    rows = train(tiny_config, [*rounds, "run.name=refilled"], reward)
    groups = [row["dynamic_sampling/groups"] for row in rows]
    assert max(groups) > 3
    for row in rows:
        # Another round is drawn exactly while there is too little, at most three times.
        useful, drawn = row["dynamic_sampling/useful_groups"], row["dynamic_sampling/groups"]
        assert drawn % 3 == 0
        assert drawn <= 12
        assert useful >= 3 or drawn == 12
        # Rewards are of everything that was drawn, not of what was chosen.
        assert row["frac_reward_zero_std"] == pytest.approx(1 - useful / drawn)
    # The rounds go through the data one after the other, whatever the step.
    data = TrainingData(Config.load(tiny_config, rounds))
    order = [
        data.train[i].prompt for n in range(int(sum(groups)) // 3) for i in data._indices(n, 3)
    ]
    assert reward.asked == order


@ON_THE_CPU
def test_dynamic_sampling_resumes_exactly(tiny_config, tmp_path):
    common = ["algorithm.dynamic_sampling_rounds=3", "checkpoint.every=2", "run.max_steps=4"]
    whole = train(tiny_config, [*common, "run.name=whole"], Picky())
    train(tiny_config, [*common, "run.name=half", "run.max_steps=2"], Picky())
    again = train(tiny_config, [*common, "run.name=half", "run.resume=auto"], Picky())

    def content(rows):
        clock = ("time/", "step_time", "tokens_per_second")
        return [{k: v for k, v in row.items() if not k.startswith(clock)} for row in rows]

    assert content(again) == content(whole)


# A hot distribution over all letters: some responses end early, most are cut.
HOT = ["rollout.soft.top_k=64", "rollout.soft.top_p=1", "rollout.soft.temperature=4"]


def test_truncated_responses_are_not_learnt_from(tiny_config):
    def length(prompts, completions, completion_ids, **columns):
        return [float(len(ids)) for ids in completion_ids]

    def index(prompts, completions, **columns):
        return list(range(len(completions)))

    masked = ["algorithm.mask_truncated=true", "run.max_steps=1"]
    # Without a hot distribution every response is cut: nothing is left to learn from.
    rows = train(tiny_config, [*masked, "run.name=cold"], index)
    assert rows[0]["completions/clipped_ratio"] == 1.0
    assert rows[0]["reward_std"] > 0
    assert rows[0]["grad_norm"] == 0.0
    plain = train(tiny_config, [*HOT, "run.max_steps=1", "run.name=plain"], length)
    some = train(tiny_config, [*HOT, *masked, "run.name=some"], length)
    assert 0 < plain[0]["completions/clipped_ratio"] < 1
    assert plain[0]["reward"] == some[0]["reward"]
    assert 0 < some[0]["grad_norm"] != plain[0]["grad_norm"]


def test_the_overlong_penalty_shapes_the_advantage_and_not_the_reward(tiny_config):
    def nothing(prompts, completions, **columns):
        return [0.0] * len(completions)

    overrides = [*HOT, "algorithm.overlong_buffer=10", "run.max_steps=1"]
    (row,) = train(tiny_config, overrides, nothing)
    assert row["reward"] == 0.0
    mean_length = row["completions/mean_length"]
    assert mean_length < 10
    assert row["rewards/overlong_penalty/mean"] == pytest.approx(-mean_length / 10)
    assert row["grad_norm"] > 0


OPTIONS = {
    "gspo": ["algorithm.ratio_level=sequence", "algorithm.loss_aggregation=sequence"],
    "k1": ["algorithm.kl_coef=0.01", "algorithm.kl_estimator=k1"],
    "truncate": ["algorithm.correction.mode=truncate"],
    "mask": ["algorithm.correction.mode=mask", "algorithm.correction.level=sequence"],
    "dirichlet": ["rollout.soft.noise=dirichlet", "rollout.soft.tau=1"],
    "gaussian": [
        "rollout.soft.noise=gaussian",
        "rollout.soft.tau=1",
        "rollout.soft.noise_scale=0.1",
    ],
    "embedding": [
        "rollout.soft.noise=embedding",
        "rollout.soft.tau=1",
        "rollout.soft.noise_scale=0.5",
        "algorithm.kl_coef=0.01",
        "algorithm.correction.mode=truncate",
    ],
    "half": ["rollout.soft.noise_scale=0.5"],
    "latent-grpo": ["algorithm.objective=latent_grpo", "rollout.soft.tau=1"],
    "discrete-full": ["rollout.soft.enabled=false", "algorithm.discrete_logprob=full"],
    "vocabulary": ["rollout.soft.enabled=false", "rollout.top_k=-1", "rollout.top_p=1"],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_train_and_watch_the_mismatch(name, tiny_config, tmp_path, rounding):
    overrides = [*QUICK, *OPTIONS[name], "run.max_steps=2"]
    assert main(["--config", str(tiny_config), *overrides]) == 0
    lines = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        assert row["grad_norm"] > 0
        # fp32 on both sides: the engine and the trainer agree, whatever was drawn.
        assert row["sampling/sampling_logp_difference/max"] < rounding
        # Drawn from candidates, scored over the vocabulary: all of it, the token that ends.
        wider = name in ("discrete-full", "latent-grpo")
        known = row.get("sampling/importance_sampling_ratio/mean", 1.0)
        assert known == pytest.approx(1.0, abs=0.6 if wider else 10 * rounding)
        assert row.get("sampling/beyond_max_ratio", 0.0) == 0.0 or wider
        assert ("candidate_entropy" in row) == (name != "vocabulary")


SMALL = {
    "model.dtype": "float32",
    "run.max_steps": 2,
    "data.eval": "null",
    "data.max_prompt_tokens": 110,
    "rollout.prompts_per_step": 4,
    "rollout.group_size": 4,
    "rollout.max_new_tokens": 10,
    "rollout.max_batch_size": 16,
    "rollout.kv_memory": 0.01,
    "optim.minibatch_prompts": 2,
    "optim.lr": 1e-3,
    "reward.workers": 1,
    "checkpoint.every": 0,
    "eval.every": 0,
}


# The others differ from these in nothing that a tiny model could tell.
RECIPES = [
    "paper-1.5b",
    "paper-1.5b-discrete",
    "figure-3a-dirichlet",
    "figure-3a-gaussian",
    "figure-3b-top-p-1.0-tau-0.25",
]


@pytest.mark.parametrize("name", RECIPES)
def test_the_paper_s_recipes_run_on_a_tiny_model(name, tmp_path, tiny_model, tiny_reward):
    """Everything of them but the sizes, the model and the data."""
    data = tmp_path / "deepscaler.jsonl"
    rows = [{"problem": f"say {c}", "answer": c, "solution": c} for c in "abcdefgh"]
    rows.append({"problem": "x" * 90, "answer": "x", "solution": "x"})
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = [f"{key}={value}" for key, value in SMALL.items()]
    overrides = [f"model.path={tiny_model}", f"data.train={data}", f"run.output_dir={tmp_path}"]
    overrides.append(f'reward.functions=[{{path: "{tiny_reward}:early_letters"}}]')
    trainer = Trainer(Config.load(name, [*QUICK, *small, *overrides]))
    folder = trainer.train()
    assert trainer.data.too_long == 1
    assert trainer.data.train[0].prompt.startswith("say a Let's think step by step and output")
    for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        assert row["grad_norm"] > 0
        assert row["sampling/sampling_logp_difference/max"] < 1e-3
        assert row["kl"] >= 0
        assert ("soft/top_weight" in row) == (not name.endswith("discrete"))


DEMOS = sorted(p.name for p in files("softgrpo").joinpath("recipes").iterdir() if "demo-" in p.name)


@pytest.mark.parametrize("name", [file.removesuffix(".yaml") for file in DEMOS])
def test_the_demo_of_every_method_runs_on_a_tiny_model(name, tmp_path, tiny_model, tiny_reward):
    data = tmp_path / "letters.jsonl"
    data.write_text("".join(json.dumps({"expression": c, "answer": c}) + "\n" for c in "abcdefgh"))
    small = [f"{key}={value}" for key, value in SMALL.items()]
    overrides = [f"model.path={tiny_model}", f"data.train={data}", f"run.output_dir={tmp_path}"]
    overrides += ["data.eval=null", "data.few_shot=[]", "run.max_steps=2"]
    overrides += ["reward.require_eos=false"]
    overrides.append(f'reward.functions=[{{path: "{tiny_reward}:early_letters"}}]')
    folder = Trainer(Config.load(name, [*QUICK, *small, *overrides])).train()
    for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        assert row["grad_norm"] > 0
        assert row["sampling/sampling_logp_difference/max"] < 1e-3
        assert row["soft/effective_candidates"] >= 1


SCHEDULE = [
    "algorithm.objective=censored",
    "rollout.soft.weight_floor=0.2",
    "rollout.schedule.steps=3",
    "rollout.schedule.weight_floor=0",
    "rollout.schedule.tau=1.1",
    "rollout.schedule.noise_scale=0.5",
    "checkpoint.every=1",
]


def test_a_schedule_reaches_rollouts_and_densities_and_resumes_exactly(tiny_config, rounding):
    def letters(prompts, completions, **columns):
        return [sum(x in "abcdefgh" for x in text(c)) for c in completions]

    whole = train(tiny_config, [*SCHEDULE, "run.name=whole", "run.max_steps=4"], letters)
    train(tiny_config, [*SCHEDULE, "run.name=half", "run.max_steps=2"], letters)
    again = [*SCHEDULE, "run.name=half", "run.max_steps=4", "run.resume=auto"]
    rows = train(tiny_config, again, letters)
    assert [row["soft/tau"] for row in rows] == pytest.approx([1.1, 0.6, 0.1, 0.1])
    assert [row["soft/weight_floor"] for row in rows] == pytest.approx([0.0, 0.1, 0.2, 0.2])
    assert [row["soft/noise_scale"] for row in rows] == pytest.approx([0.5, 0.75, 1.0, 1.0])
    assert "soft/temperature" not in rows[0]
    for row in rows:  # scored as drawn: noise scale and mixtures of the same step
        assert row["grad_norm"] > 0
        assert row["sampling/sampling_logp_difference/max"] < rounding
    assert [r["grad_norm"] for r in rows] == [r["grad_norm"] for r in whole]
    assert [r["reward"] for r in rows] == [r["reward"] for r in whole]
