"""Recipes, overrides, and one clear line for every mistake."""

from dataclasses import asdict

import pytest

from softgrpo.config import Config, ConfigError, recipe_names
from softgrpo.config.rollout import RolloutConfig, SoftConfig
from softgrpo.config.sections import DataConfig

DATA = ["data.train=a.jsonl"]


def load(tmp_path, text, overrides=()):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return Config.load(path, [*DATA, *overrides])


def message(*args):
    with pytest.raises(ConfigError) as error:
        load(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_demo_recipe_is_packaged_and_as_described():
    assert "demo" in recipe_names()
    config = Config.load("demo")
    assert config.algorithm.objective == "official"
    assert config.optim.lr == 1e-5
    assert (config.rollout.prompts_per_step, config.rollout.group_size) == (8, 8)
    assert config.rollout.max_new_tokens == 32
    assert config.data.few_shot[0].answer == "5 + 2 = 7\n\\boxed{7}"
    assert config.data.system_prompt == "Put the final answer in \\boxed{}."
    assert config.reward.require_eos
    assert config.run.max_steps == 40
    assert Config.load("demo", ["rollout.soft.enabled=false"]).rollout.soft.enabled is False


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_has_a_folder_of_its_own(name):
    assert Config.load(name).run.name == name


def differences(one, other):
    """The dotted keys, with both values, in which two configurations differ."""
    found = {}
    for key, value in one.items():
        if isinstance(value, dict):
            inner = differences(value, other[key])
            found |= {f"{key}.{name}": pair for name, pair in inner.items()}
        elif value != other[key]:
            found[key] = (value, other[key])
    return found


# The table of the authors' launch scripts: what changes against the 1.5B one.
PRESETS = {
    "paper-1.5b": {},
    "paper-3b": {
        "model.path": "meta-llama/Llama-3.2-3B-Instruct",
        "rollout.kv_memory": 50.0,
        "checkpoint.every": 80,
        "eval.every": 20,
    },
    "paper-7b": {"model.path": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "eval.every": 20},
    "figure-3a-dirichlet": {
        "rollout.soft.noise": "dirichlet",
        "rollout.soft.tau": 1.0,
        "algorithm.objective": "exact",
        "algorithm.kl_estimator": "k2",
    },
    "figure-3a-gaussian": {
        "rollout.soft.noise": "gaussian",
        "rollout.soft.noise_scale": 0.05,
        "rollout.soft.tau": 1.0,
        "algorithm.objective": "exact",
        "algorithm.kl_estimator": "k2",
        "checkpoint.every": 80,
    },
    "figure-3b-top-p-1.0-tau-0.1": {"rollout.soft.top_p": 1.0},
    "figure-3b-top-p-0.95-tau-0.25": {"rollout.soft.tau": 0.25},
    "figure-3b-top-p-1.0-tau-0.25": {"rollout.soft.top_p": 1.0, "rollout.soft.tau": 0.25},
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_of_the_paper(name):
    config = Config.load(name)
    paper = asdict(Config.load("paper-1.5b"))
    changed = {key: new for key, (_, new) in differences(paper, asdict(config)).items()}
    assert changed.pop("run.name", "paper-1.5b") == name
    assert changed == PRESETS[name]
    if name.startswith("paper"):
        discrete = differences(asdict(config), asdict(Config.load(f"{name}-discrete")))
        assert discrete.pop("run.name")
        assert discrete == {"rollout.soft.enabled": (True, False)}


def test_the_paper_s_hyperparameters():
    """ALGORITHM.md section 3, and section 5 of the account of the authors' scripts."""
    config = Config.load("paper-1.5b")
    rollout, algorithm, optim = config.rollout, config.algorithm, config.optim
    assert (rollout.prompts_per_step, rollout.group_size, optim.minibatch_prompts) == (64, 8, 32)
    assert (config.data.max_prompt_tokens, rollout.max_new_tokens) == (1024, 8192)
    soft = rollout.soft
    assert (soft.temperature, soft.top_p, soft.top_k, soft.tau) == (1.0, 0.95, 5, 0.1)
    assert (rollout.temperature, rollout.top_p, rollout.top_k) == (1.0, 0.95, 5)
    assert (optim.lr, optim.schedule, optim.warmup_steps) == (1e-6, "constant", 0)
    assert (optim.weight_decay, optim.grad_clip, optim.betas) == (0.01, 1.0, (0.9, 0.999))
    assert (algorithm.clip_low, algorithm.clip_high, algorithm.dual_clip) == (0.2, 0.2, 3.0)
    assert (algorithm.kl_coef, algorithm.kl_estimator) == (0.001, "k3")
    assert (algorithm.objective, algorithm.advantage) == ("official", "grpo")
    assert (config.run.max_steps, config.checkpoint.every, config.eval.every) == (629, 200, 40)
    assert not config.reward.require_eos
    assert config.data.prompt_template == (
        "{problem} Let's think step by step and output the final answer within \\boxed{}."
    )


def test_a_base_is_merged_key_by_key_and_only_once(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "data: {train: a.jsonl, few_shot: [{prompt: a, answer: b}]}\n"
        "optim: {lr: 1e-3, betas: [0.8, 0.9]}\n"
    )
    child = tmp_path / "child.yaml"
    child.write_text(
        f"base: {tmp_path}/base.yaml\noptim: {{betas: [0.1, 0.2]}}\ndata: {{few_shot: []}}\n"
    )
    config = Config.load(child, ["optim.weight_decay=0.5"])
    assert (config.optim.lr, config.optim.betas) == (1e-3, (0.1, 0.2))
    assert config.optim.weight_decay == 0.5
    assert config.data.train == "a.jsonl"
    assert config.data.few_shot == []
    (tmp_path / "grandchild.yaml").write_text(f"base: {child}\n")
    with pytest.raises(ConfigError, match="has a base of its own"):
        Config.load(tmp_path / "grandchild.yaml")
    assert "no packaged recipe 'paper-1.5'; did you mean 'paper-1.5b'" in message(
        tmp_path, "base: paper-1.5\n"
    )
    assert "unknown section 'base'" in message(tmp_path, "", ["base=demo"])
    assert "unknown key 'optim.lrr'" in message(tmp_path, "base: demo\noptim: {lrr: 1}\n")


def test_a_dumped_config_loads_to_an_equal_one(tmp_path):
    config = Config.load(
        "demo", ["optim.lr=3e-7", "eval.k=[1, 4]", "rollout.kv_memory=0.5", "run.name=007"]
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert Config.load(path) == config
    assert config.run.name == "007"
    assert config.eval.k == [1, 4]


def test_values_are_read_by_the_type_of_their_key(tmp_path):
    config = load(
        tmp_path,
        "optim: {lr: 1e-5, minibatch_prompts: null}\nrun:\n  name: no\neval:\n",
        [
            "optim.betas=[0.8, 9.5e-1]",
            "rollout.soft.end_of_thinking=32",
            "rollout.soft.max_soft_tokens=7",
            "reward.functions=[{path: m.f, weight: 2}, {path: m.g}]",
        ],
    )
    assert config.optim.lr == 1e-5
    assert config.optim.minibatch_prompts is None
    assert config.optim.betas == (0.8, 0.95)
    assert config.run.name == "no"
    assert config.rollout.soft.end_of_thinking == 32
    assert config.rollout.soft.max_soft_tokens == 7
    assert [(f.path, f.weight) for f in config.reward.functions] == [("m.f", 2.0), ("m.g", 1.0)]
    text = load(tmp_path, "", ["rollout.soft.end_of_thinking=</think>"])
    assert text.rollout.soft.end_of_thinking == "</think>"
    assert load(tmp_path, "", ["rollout.soft.end_of_thinking=null"]).rollout.soft == SoftConfig(
        end_of_thinking=None
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rollout.topk=5", "unknown key 'rollout.topk'; did you mean 'rollout.top_k'?"),
        ("rollout.soft.taw=1", "unknown key 'rollout.soft.taw'; did you mean 'rollout.soft.tau'?"),
        ("rollout.tau=1", "unknown key 'rollout.tau'; did you mean 'rollout.soft.tau'?"),
        ("optimizer.lr=1", "unknown section 'optimizer'; did you mean 'optim'?"),
        ("lr=1", "unknown section 'lr'; did you mean 'optim.lr'?"),
        ("log.zzz=1", "unknown key 'log.zzz'; the keys are: samples_every, samples_per_step"),
        ("run.max_steps=1.5", "run.max_steps: expected an integer, got '1.5'"),
        ("run.max_steps=true", "run.max_steps: expected an integer, got 'true'"),
        ("run.max_steps=0", "run.max_steps: 0 is not allowed: must be >= 1"),
        ("optim.lr=fast", "optim.lr: expected a finite number, got 'fast'"),
        ("optim.lr=nan", "optim.lr: expected a finite number, got 'nan'"),
        ("optim.lr=0", "optim.lr: 0 is not allowed: must be > 0"),
        ("optim.minibatch_prompts=0", "optim.minibatch_prompts: 0 is not allowed: must be >= 1"),
        ("optim.betas=[0.9]", "optim.betas: expected a list of 2 values, got 1"),
        ("optim.betas=[0.9, 1]", "optim.betas: [0.9, 1.0] is not allowed: must be < 1"),
        ("rollout.group_size=1", "rollout.group_size: 1 is not allowed: must be >= 2"),
        ("rollout.top_p=1.5", "rollout.top_p: 1.5 is not allowed: must be > 0 and <= 1"),
        ("rollout.soft.top_k=65", "rollout.soft.top_k: 65 is not allowed: must be >= 1 and <= 64"),
        (
            "rollout.soft.switch_window=512",
            "rollout.soft.switch_window: is for inference alone (SoftParams, softgrpo-eval): the "
            "choice that it makes is a function of the policy which no density sees; leave it out",
        ),
        (
            "rollout.soft.min_soft_tokens=40",
            "rollout.soft.min_soft_tokens: 40 is more than rollout.max_new_tokens (32)",
        ),
        ("rollout.soft.enabled=1", "rollout.soft.enabled: expected true or false, got '1'"),
        ("rollout=3", "rollout: expected keys (engine, "),
        ("eval.k=8", "eval.k: expected a list, got '8'"),
        ("eval.k=[1, 9]", "eval.k: [1, 9] is not allowed: each k must be <= eval.samples (8)"),
        ("eval.every=5", "eval.every is set, but data.eval names no dataset"),
        ("data.train=", "data.train is not set: name a dataset"),
        ("data.few_shot=[{prompt: a}]", "data.few_shot[0].answer is missing"),
        ("reward.functions=[]", "reward.functions is empty"),
        ("run.name", "override 'run.name' is not of the form section.key=value"),
        ("eval.k=[1", "override 'eval.k=[1': not valid YAML"),
        (
            "algorithm.objective=offical",
            "algorithm.objective: 'offical' is not allowed: must be one of exact, official",
        ),
    ],
)
def test_a_bad_override_names_key_value_and_remedy(tmp_path, override, expected):
    assert message(tmp_path, "", [override]).startswith(expected)


def test_noise_and_objective_must_fit(tmp_path):
    clip = "rollout.soft.noise_clip=[-1.5, 3]"
    official = "algorithm.objective=official"
    assert "'official' sets the clip [-1.5, 3] itself" in message(tmp_path, "", [clip, official])
    assert "density of unclipped noise" in message(tmp_path, "", [clip])
    assert "'none' cannot be trained" in message(tmp_path, "", ["rollout.soft.noise=none"])
    discrete = load(tmp_path, "", ["rollout.soft.noise=none", "rollout.soft.enabled=false"])
    assert not discrete.rollout.soft.enabled


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["rollout.soft.noise=multiplex"], "draws the weights themselves; set tau=1"),
        (["rollout.soft.noise=mean"], "'exact' is no density of rollout.soft.noise 'mean', which"),
        (
            [
                "rollout.soft.noise=mean",
                "rollout.soft.weight_floor=0.1",
                "algorithm.objective=token",
            ],
            "rollout.soft.weight_floor: noise 'mean' has none",
        ),
        (
            ["rollout.soft.noise=dirichlet", "algorithm.objective=official"],
            "'official' is no density of rollout.soft.noise 'dirichlet', which needs",
        ),
        (
            ["rollout.soft.noise=embedding", "rollout.soft.weight_floor=0.1"],
            "rollout.soft.weight_floor: noise 'embedding' has none, as its mixture is a smooth",
        ),
        (
            [
                "rollout.soft.noise=embedding",
                "rollout.schedule.steps=4",
                "rollout.schedule.weight_floor=0.1",
            ],
            "rollout.schedule.weight_floor: noise 'embedding' has none",
        ),
        (
            ["rollout.soft.noise=embedding", "algorithm.objective=concrete"],
            "is no density of rollout.soft.noise 'embedding', which needs objective exact",
        ),
        (["algorithm.objective=censored"], "set rollout.soft.weight_floor, such as 0.1"),
        (["rollout.soft.weight_floor=2"], "rollout.soft.weight_floor: 2 is not allowed"),
        (["rollout.soft.noise=gaussian"], "draws the weights themselves; set tau=1"),
        (
            [
                "rollout.soft.noise=gaussian",
                "rollout.soft.tau=1",
                "algorithm.correction.mode=truncate",
            ],
            "algorithm.correction.mode: the record of 'gaussian' noise does not give",
        ),
        (["algorithm.ratio_level=sequence"], "set algorithm.loss_aggregation=sequence"),
        (["algorithm.overlong_buffer=33"], "33 is more than rollout.max_new_tokens (32)"),
        (
            ["algorithm.objective=latent_grpo", "algorithm.correction.mode=mask"],
            "algorithm.correction.mode: the record of objective 'latent_grpo' does not give",
        ),
        (["algorithm.correction.max=1"], "algorithm.correction.max: 1 is not allowed: must be > 1"),
        (["algorithm.kl_estimator=k4"], "must be one of auto, k1, k2, k3"),
        (
            ["algorithm.kl_estimator=k3", "algorithm.kl_coef=0.001"],
            "algorithm.kl_estimator: k3 has an infinite variance under objective 'exact'",
        ),
        (["health.window=5"], "a trend needs >= 10 steps"),
        (["health.window=0", "health.stop=true"], "a trend needs >= 10 steps"),
        (["checkpoint.every=0", "health.stop=true"], "no checkpoint to go back to"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, overrides, expected):
    assert expected in message(tmp_path, "", overrides)


def test_a_config_made_in_python_passes_the_same_cross_checks():
    with pytest.raises(ConfigError, match="cannot be trained"):
        Config(
            data=DataConfig(train="a.jsonl"), rollout=RolloutConfig(soft=SoftConfig(noise="none"))
        )
    with pytest.raises(ConfigError, match=r"data\.train is not set"):
        Config()


def test_missing_recipes_and_files(tmp_path):
    with pytest.raises(ConfigError, match="no packaged recipe 'dmeo'; did you mean 'demo'"):
        Config.load("dmeo")
    with pytest.raises(ConfigError, match=r"cannot read config file '.*nope\.yaml': No such file"):
        Config.load(tmp_path / "nope.yaml")
    assert "not valid YAML" in message(tmp_path, "run: [")
    assert "expected sections" in message(tmp_path, "- a\n- b\n")


@pytest.mark.parametrize("name", ["../../x", "a/b", "/x", "..", ".", "", "a\\b"])
def test_a_run_stays_in_its_output_dir(name, tmp_path):
    said = message(tmp_path, "", [f"run.name={name}"])
    assert said.startswith("run.name: ")
    assert "must be the name of one folder" in said


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"run:\n  name: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"recipe.yaml': it is no UTF-8 text$"):
        Config.load(path)
