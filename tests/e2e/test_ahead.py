"""rollout.ahead: the next step is sampled during the update, one step off-policy."""

import json
import os
import signal
import threading

import pytest
import torch
from checkpoints import tensors_of

from softgrpo import Config, Trainer
from softgrpo.config import ConfigError
from softgrpo.rewards import RewardError
from softgrpo.run.interrupt import Interrupted
from softgrpo.run.round import _stream_beside, sampled_beside

QUICK = ["checkpoint.export_hf=false", "log.samples_every=0", "checkpoint.every=0"]
CORRECTED = "algorithm.correction.mode=truncate"
CLOCK = ("time/", "step_time", "tokens_per_second")


def load(tiny_config, *overrides):
    return Config.load(tiny_config, [*QUICK, CORRECTED, "rollout.ahead=1", *overrides])


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [without_clock(row) for row in rows]


def without_clock(row):
    """The numbers of it: NaN is null in metrics.jsonl."""
    row = {name: value for name, value in row.items() if not name.startswith(CLOCK)}
    return {name: value for name, value in row.items() if value is not None and value == value}


def threads():
    return [t.name for t in threading.enumerate() if t.name.startswith("softgrpo-rollout")]


@pytest.mark.parametrize("soft", ["true", "false"], ids=["soft", "discrete"])
def test_it_is_what_rollouts_of_the_weights_before_give(soft, tiny_config, rounding):
    settings = (f"rollout.soft.enabled={soft}", "run.max_steps=4")
    rows = rows_of(Trainer(load(tiny_config, *settings)).train())
    oracle = Trainer(load(tiny_config, *settings, "rollout.ahead=0", "run.name=oracle"))
    drawn, expected = oracle._round(0, oracle.config.rollout), []
    drawn.sample()
    for step in range(1, 5):
        following = oracle._round(step, oracle.config.rollout)
        following.sample()  # with the weights before the update, one after the other
        oracle._ahead, drawn = drawn, following
        expected.append(without_clock(oracle.step(step)))
    oracle.rewards.close()
    assert [row.pop("sampling/weight_lag") for row in rows] == [0, 2, 2, 2]  # two minibatches
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-6)
    ratios = [row["sampling/importance_sampling_ratio/max"] for row in rows]
    assert ratios[0] < 1 + 10 * rounding
    assert min(ratios[1:]) > 1.001
    assert not threads()


def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_ended(tiny_config, tmp_path):
    settings = ["checkpoint.every=2", "algorithm.dynamic_sampling_rounds=1", "rollout.top_k=0"]
    settings += ["algorithm.kl_coef=0.1", "optim.tokens_per_microbatch=45"]
    settings += ["rollout.schedule.steps=4", "rollout.schedule.tau=0.5"]
    whole = Trainer(load(tiny_config, *settings, "run.name=whole")).train()
    run = Trainer(load(tiny_config, *settings, "run.max_steps=4")).train()
    Trainer(load(tiny_config, *settings, "run.resume=auto")).train()
    assert [row["sampling/weight_lag"] for row in rows_of(run)] == [0, 2, 0, 2, 0, 2]
    ours, theirs = (tensors_of(folder / "checkpoints/step_000006") for folder in (run, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_nothing_is_left_of_it_when_the_update_fails(tiny_config):
    trainer = Trainer(load(tiny_config))
    trainer.policy.decoder.model.norm.weight.register_hook(lambda grad: grad * torch.nan)
    with pytest.raises(FloatingPointError, match="the gradient norm is nan"):
        trainer.train()
    assert not threads()
    assert not trainer.llm.scheduler.has_work
    assert trainer.rewards._workers[0]._process.poll() is not None


def test_an_engine_that_does_not_number_its_device(tiny_config, rounding):
    settings = ("run.max_steps=2", "rollout.engine=hf")
    rows = rows_of(Trainer(load(tiny_config, *settings)).train())
    native = rows_of(Trainer(load(tiny_config, "run.max_steps=2", "run.name=native")).train())
    # Where rounding decides between tokens, the samples part; of weights that an update has moved
    # it decides more often, because Adam makes whole steps of the smallest gradients.
    for row, other, excused in zip(rows, native, (min(0.1, rounding), 0.1), strict=True):
        assert row["reward"] == pytest.approx(other["reward"], abs=excused)


def test_all_steps_sample_on_one_stream(gpu, monkeypatch):
    """What is freed on a stream is kept for it: one more a step would hold ever more memory."""

    class Drawn:
        def sample(self):
            streams.append(torch.cuda.current_stream())

    made, streams, new = [], [], torch.cuda.Stream

    def stream(*where, **which):
        if which:  # one that is there already
            return new(*where, **which)
        made.append(new(*where))
        return made[-1]

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    _stream_beside.cache_clear()
    for _ in range(3):
        with sampled_beside(Drawn(), gpu):
            pass
    assert len(made) == 1
    assert streams == made * 3
    _stream_beside.cache_clear()


def test_an_error_of_it_ends_the_run(tiny_config, tmp_path):
    path = tmp_path / "bad.py"
    path.write_text(
        "calls = []\n"
        "def bad(completions, **columns):\n"
        "    calls.append(1)\n"
        "    return [1 / (len(calls) < 5)] * len(completions)\n"
    )
    trainer = Trainer(load(tiny_config, f'reward.functions=[{{path: "{path}:bad"}}]'))
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        trainer.train()
    assert not threads()


def test_a_signal_saves_and_the_first_step_after_it_is_on_policy(tiny_config, tmp_path):
    def interrupted(completions, **columns):
        rounds.append(len(completions))
        if len(rounds) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return letters(completions)

    def letters(completions, **columns):
        return [float(sum("a" <= x <= "m" for x in text)) for text in completions]

    rounds = []
    with pytest.raises(Interrupted, match="saved after step 3 of 6"):
        Trainer(load(tiny_config), interrupted).train()
    assert not threads()
    rows = rows_of(Trainer(load(tiny_config, "run.resume=auto"), letters).train())
    assert [row["sampling/weight_lag"] for row in rows] == [0, 2, 2, 0, 2, 2]


def test_it_needs_importance_weights(tiny_config):
    with pytest.raises(
        ConfigError, match=r"rollout\.ahead: .* set algorithm\.correction\.mode=trunc"
    ):
        load(tiny_config, "algorithm.correction.mode=none")
    multiplex = ("rollout.soft.noise=multiplex", "rollout.soft.tau=1", "rollout.soft.noise_scale=2")
    with pytest.raises(ConfigError, match=r"rollout\.ahead: the record of 'multiplex' noise .*=0"):
        load(tiny_config, *multiplex)
