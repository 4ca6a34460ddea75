"""The health watch on made-up runs, the pattern of the published collapses among them."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from softgrpo.log.health import KL, MISMATCH, HealthWatch, health_warnings, trend

STEPS, FALLS = 629, 560


def run(reward, mismatch, kl, *, noise=0.05, seed=0):
    """Rows of a run whose curves are functions of the step, each with relative noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(1, STEPS + 1):
        wobble = 1 + noise * rng.normal(size=3)
        rows.append(
            {
                "step": step,
                "reward": reward(step) * wobble[0],
                MISMATCH: mismatch(step) * wobble[1],
                KL: kl(step) * wobble[2],
            }
        )
    return rows


def rises(start, peak, at):
    """Learns up to a peak, then stays."""
    return lambda step: start + (peak - start) * min(1.0, step / at)


def official_collapse(step):
    """(top_p 1.0, tau 0.1): 0.513 at step 369, then flat, falls near step 600 to 0.368."""
    return rises(0.35, 0.513, 369)(step) - 0.145 * max(0.0, (step - FALLS) / (STEPS - FALLS))


COLLAPSE = (
    official_collapse,
    lambda step: 0.0026 + 0.0045 * step / STEPS,
    lambda step: 0.029 * (step / STEPS) ** 2,
)


@pytest.mark.parametrize("seed", range(5))
def test_the_official_pattern_is_warned_of_long_before_the_reward_falls(seed):
    warnings = health_warnings(run(*COLLAPSE, seed=seed), 50)
    mismatch = [w for w in warnings if w.text.startswith("the engine/trainer mismatch rises")]
    kl = [w for w in warnings if w.text.startswith("the KL to the first model rises")]
    fall = [w for w in warnings if w.text.startswith("the reward fell")]
    assert mismatch[0].step < 400
    assert kl[0].step < FALLS
    assert FALLS < fall[0].step < STEPS
    assert "times that of the first" in mismatch[0].text
    assert "and the reward does not" in kl[0].text
    assert "and the engine/trainer mismatch came to 2." in fall[0].text
    assert "and the KL to the first model went from" in fall[0].text
    steps = [w.step for w in mismatch]
    assert all(b - a >= 50 for a, b in itertools.pairwise(steps))


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_is_left_alone(seed):
    """The discrete baseline: the reward rises, KL with it; the mismatch is that of the dtype."""
    healthy = (rises(0.35, 0.53, STEPS), lambda step: 0.0023, lambda step: 3e-6 * step)
    assert health_warnings(run(*healthy, seed=seed), 50) == []


def test_the_published_run_that_held_has_a_rising_mismatch_and_no_more():
    """(top_p 0.95, tau 0.1): mismatch 0.0023 to 0.0042, KL to 0.010, best reward at the end."""
    held = (
        rises(0.35, 0.52, 624),
        lambda step: 0.0023 + 0.0019 * step / STEPS,
        lambda step: 0.010 * step / STEPS,
    )
    texts = {warning.text.split(" rises")[0] for warning in health_warnings(run(*held), 50)}
    assert texts == {"the engine/trainer mismatch"}


def test_a_falling_reward_alone_is_no_collapse():
    """Harder data: the policy did not drift."""
    steady = (official_collapse, lambda step: 0.0023, lambda step: 0.001)
    watch = HealthWatch(50)
    for row in run(*steady):
        watch.observe(row)
    assert not watch.collapsed


def test_discrete_rewards_with_much_noise_are_no_collapse():
    noisy = (
        lambda step: 0.5,
        lambda step: 0.0026 + 0.0045 * step / STEPS,
        lambda step: 1e-5 * step,
    )
    watch = HealthWatch(50)
    for row in run(*noisy, noise=0.3):
        watch.observe(row)
    assert not watch.collapsed


def test_the_best_window_is_found():
    watch = HealthWatch(50)
    for row in run(*COLLAPSE):
        watch.observe(row)
    assert watch.collapsed
    checkpoints = range(40, STEPS, 40)
    assert 369 <= watch.best(checkpoints) <= FALLS
    # A lucky first step is not a window, and of equals the latest counts.
    flat = HealthWatch(20)
    for step in range(1, 60):
        flat.observe({"step": step, "reward": 9.0 if step == 1 else 0.5})
    assert flat.best([1, 30, 40]) == 40
    assert flat.best([1]) == 1


def test_missing_numbers_are_left_out():
    """No reference, a kind of noise without mismatch, a step whose rewards were all lost."""
    rows = [{"step": step, "reward": None if step % 7 == 0 else 0.5} for step in range(1, 200)]
    assert health_warnings(rows, 20) == []
    rows = [{**row, KL: None if row["step"] % 3 == 0 else row[KL]} for row in run(*COLLAPSE)]
    assert any("KL" in warning.text for warning in health_warnings(rows, 50))


def test_window_0_says_nothing():
    assert health_warnings(run(*COLLAPSE), 0) == []


def test_trend_is_kendall_s_statistic():
    """Against scipy's tau: z = S / sqrt(n (n - 1) (2 n + 5) / 18), with its step towards 0."""
    values = np.random.default_rng(0).normal(size=30) + np.arange(30) / 10
    s = stats.kendalltau(np.arange(30), values).statistic * 30 * 29 / 2
    expected = (s - np.sign(s)) / math.sqrt(30 * 29 * 65 / 18)
    assert trend(values) == pytest.approx(expected)
    assert trend(-values) == pytest.approx(-expected)
    assert trend(np.array([1.0, np.nan, np.nan])) == 0.0
    false_alarms = [trend(np.random.default_rng(i).normal(size=50)) > 3 for i in range(2000)]
    assert np.mean(false_alarms) < 0.005
