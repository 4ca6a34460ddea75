"""`rollout.schedule`: soft settings that change over the first steps."""

import pytest

from softgrpo import Config
from softgrpo.config import ConfigError
from softgrpo.config.rollout import SoftConfig
from softgrpo.config.schedule import soft_at
from softgrpo.rollout.sampling import density_settings, soft_params
from softgrpo.run.held_out import evaluation_rollout

TAU = ["rollout.schedule.steps=5", "rollout.schedule.tau=1.1"]
FLOOR = ["rollout.soft.weight_floor=0.2", "rollout.schedule.weight_floor=0"]


def test_values_go_linearly_to_those_of_the_soft_section():
    config = Config.load("demo", [*TAU, *FLOOR, "rollout.soft.tau=0.1"])
    taus = [soft_at(config.rollout, step).tau for step in range(1, 8)]
    assert taus == pytest.approx([1.1, 0.85, 0.6, 0.35, 0.1, 0.1, 0.1])
    floors = [soft_at(config.rollout, step).weight_floor for step in range(1, 6)]
    assert floors == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    assert soft_at(config.rollout, 5) is config.rollout.soft
    assert soft_at(config.rollout, 1).temperature == config.rollout.soft.temperature
    assert evaluation_rollout(config).soft == config.rollout.soft
    assert soft_params(config.rollout, "exact").tau == 0.1
    settings = density_settings(config, soft_at(config.rollout, 2))
    assert (settings.tau, settings.weight_floor) == pytest.approx((0.85, 0.05))


def test_without_steps_nothing_is_scheduled():
    config = Config.load("demo", ["rollout.schedule.tau=1.0"])
    assert soft_at(config.rollout, 1) is config.rollout.soft
    assert config.rollout.schedule.starts == {}
    assert isinstance(config.rollout.soft, SoftConfig)


GAUSSIAN = ["rollout.soft.noise=gaussian", "rollout.soft.tau=1", "algorithm.objective=exact"]
REFUSED = {
    "no start value": (["rollout.schedule.steps=5"], "nothing would change"),
    "one step": (["rollout.schedule.steps=1", "rollout.schedule.tau=1"], "set steps above 1"),
    "tau": ([*TAU, *GAUSSIAN], "rollout.schedule.tau: noise 'gaussian' draws the weights"),
    "range": ([*TAU, "rollout.schedule.weight_floor=2"], "rollout.schedule.weight_floor: 2 is not"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_nonsense_is_refused_in_one_line(case):
    overrides, message = REFUSED[case]
    with pytest.raises(ConfigError) as error:
        Config.load("demo", overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_scheduled_floor_of_censored_may_start_at_its_limit():
    Config.load("demo", [*TAU, *FLOOR, "algorithm.objective=censored"])
    discrete = Config.load("demo", ["rollout.schedule.steps=5", "rollout.soft.enabled=false"])
    assert not discrete.rollout.soft.enabled
