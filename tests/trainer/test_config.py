"""Recipes, overrides, and one clear line for every mistake."""

import pytest

from softgrpo.config import Config, ConfigError, DataConfig, RolloutConfig, SoftConfig, recipe_names

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
