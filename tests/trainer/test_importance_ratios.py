"""With the weights that sampled, every importance ratio is 1, whatever was drawn and scored."""

from dataclasses import replace

import pytest
import torch
from tiny_decoder import make_decoder

from softgrpo.config import Config
from softgrpo.learner.optimizer import make_optimizer
from softgrpo.learner.policy import Policy
from softgrpo.learner.update import Update
from softgrpo.rollout.batch import RolloutBatch
from softgrpo.rollout.sampling import Sampling, collect, density_settings, needs_kept_mass
from softgrpo_engine import LLM

ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, -0.5])
DISCRETE, FULL = "rollout.soft.enabled=false", "algorithm.discrete_logprob=full"
SOFT = ["rollout.soft.end_of_thinking=2", "rollout.soft.max_soft_tokens=4"]
OFFICIAL = "algorithm.objective=official"
CASES = {
    # Candidates; a cut set over the vocabulary, listed or not; all of it; answers behind thoughts
    # whose end is drawn or forced, the end of `official` scored over the vocabulary.
    "candidates": ([DISCRETE], False),
    "listed": ([DISCRETE, FULL], True),
    "nucleus": ([DISCRETE, "rollout.top_k=-1"], True),
    "top-k": ([DISCRETE, "rollout.top_k=70", "rollout.top_p=1"], True),
    "vocabulary": ([DISCRETE, "rollout.top_k=-1", "rollout.top_p=1"], False),
    "soft": (SOFT, False),
    "soft, listed": ([*SOFT, FULL], True),
    "soft, nucleus": ([*SOFT, "rollout.top_k=0", "algorithm.objective=concrete"], True),
    "official": ([*SOFT, FULL, OFFICIAL, "rollout.soft.top_p=1"], True),
}


def rollout(config, engine):
    batch = RolloutBatch.from_outputs(
        collect(
            engine,
            [[5, 6, 7, 8]],
            [[0, 1, 2, 3]],
            replace(Sampling.of_step(config, config.rollout), seed=3),
        ),
        seed=3,
        stream=0,
        weight_version=0,
    )
    assert (batch.kept_mass is not None) == needs_kept_mass(config)
    return batch


def load(overrides):
    common = ["algorithm.objective=exact", "rollout.max_new_tokens=12", "rollout.temperature=0.8"]
    return Config.load("demo", [*common, "optim.grad_clip=1e9", *overrides])


def updated(config, batch):
    """(metrics row, gradient of the head) of one update with the weights that sampled."""
    policy = Policy(make_decoder(vocab_size=80), density_settings(config), torch.float32)
    update = Update(policy, None, make_optimizer(policy.decoder, config.optim))
    row, taken = update(batch, ADVANTAGES, 1e-9, config)
    assert taken == 1
    return row, policy.decoder.lm_head_weight.grad


@pytest.mark.parametrize("case", CASES)
def test_it_is_1_on_policy(case, tmp_path):
    overrides, needs_mass = CASES[case]
    config = load(overrides)
    assert needs_kept_mass(config) == needs_mass
    batch = rollout(config, LLM(make_decoder(vocab_size=80), kv_memory=0.01))
    batch.save(tmp_path / "batch.safetensors")
    batch = RolloutBatch.load(tmp_path / "batch.safetensors")
    row, gradient = updated(config, batch)
    name = "sampling/importance_sampling_ratio"
    # The density of a soft position multiplies a rounding of log q by up to exp(-noise).
    for part in ("min", "mean", "max"):
        assert row[f"{name}/{part}"] == pytest.approx(1.0, abs=2e-3), part
    assert row["sampling/sampling_logp_difference/mean"] < 1e-5
    # So a correction of any kind changes nothing.
    strict = [*overrides, "algorithm.correction.mode=mask", "algorithm.correction.level=sequence"]
    corrected = load([*strict, "algorithm.correction.max=1.05"])
    _, masked = updated(corrected, batch)
    torch.testing.assert_close(masked, gradient, rtol=2e-2, atol=1e-6)
    assert gradient.abs().max() > 1e-3
