"""The gradient of an update on a rollout whose engine had other weights, against plain formulas."""

import pytest
import torch
from tiny_decoder import make_decoder

from softgrpo.algorithm.density import log_densities, rollout_logq
from softgrpo.algorithm.positions import DensitySettings
from softgrpo.config.sections import AlgorithmConfig, CorrectionConfig, OptimConfig, Sections
from softgrpo.learner.optimizer import make_optimizer
from softgrpo.learner.policy import Policy
from softgrpo.learner.update import Update
from softgrpo.rollout.batch import RolloutBatch
from softgrpo_engine import LLM, SamplingParams, SoftParams

GROUPS, SAMPLES = 3, 4
SETTINGS = DensitySettings()
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0, 0.0, 0.0, 0.0, 2.0, -1.0, -0.5, -0.5])


@pytest.fixture(scope="module")
def batch():
    """Written by an engine whose embeddings are a little off."""
    decoder = make_decoder()
    with torch.no_grad():
        decoder.embed_weight.add_(0.02 * torch.randn_like(decoder.embed_weight))
    engine = LLM(decoder, kv_memory=0.01, max_batch_size=16)
    uids = [[10 * g + s for s in range(SAMPLES)] for g in range(GROUPS)]
    prompts = [[5, 6, 7, 8][: 2 + g] for g in range(GROUPS)]
    params = SamplingParams(max_tokens=9, top_k=6, top_p=0.9)
    outputs = engine.generate_groups(prompts, params, SoftParams(top_k=5), seed=3, uids=uids)
    return RolloutBatch.from_outputs(outputs, seed=3, stream=0, weight_version=0)


@pytest.mark.parametrize("mode", ["none", "truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_gradient_is_weighed_by_the_ratio_of_trainer_to_engine(batch, mode, level):
    bound = 1.3
    policy = Policy(make_decoder(), SETTINGS, torch.float32)
    algorithm = AlgorithmConfig(
        loss_aggregation="sequence", correction=CorrectionConfig(mode, level, bound)
    )
    config = Sections(algorithm=algorithm, optim=OptimConfig(grad_clip=1e9))
    update = Update(policy, None, make_optimizer(policy.decoder, config.optim))
    row, taken = update(batch, ADVANTAGES, 1e-6, config)
    assert taken == 1

    # The same from the formulas: one update, so the gradient is A * weight * grad log density.
    plain = Policy(make_decoder(), SETTINGS, torch.float32)
    scored = plain(batch)
    theirs = rollout_logq(scored.positions, SETTINGS)
    behaviour = log_densities(theirs, scored.positions.logprobs, scored.positions, SETTINGS)
    log_ratio = (scored.density - behaviour).tolist()
    loss, start, beyond, tokens = 0.0, 0, 0, 0
    for sample, length in enumerate(batch.response_lens.tolist()):
        ratios = log_ratio[start : start + length]
        if level == "sequence":
            ratios = [sum(ratios)] * length
        useful = ADVANTAGES[sample // SAMPLES * SAMPLES :][:SAMPLES].any()
        for t, value in enumerate(ratios):
            ratio = torch.tensor(value).exp().item()
            outside = ratio > bound or (mode != "truncate" and ratio < 1 / bound)
            weight = 1.0 if mode == "none" else min(ratio, bound)
            if mode == "mask" and outside:
                weight = 0.0
            scale = weight * ADVANTAGES[sample].item() / (length * GROUPS * SAMPLES)
            loss = loss - scale * scored.density[start + t]
            beyond += bool(outside and useful)
            tokens += bool(useful)
        start += length
    loss.backward()
    for ours, expected in zip(policy.decoder.parameters(), plain.decoder.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=2e-3, atol=1e-6)
    assert row["sampling/beyond_max_ratio"] == pytest.approx(beyond / tokens)
    assert 0.05 < row["sampling/beyond_max_ratio"] < 0.95
    assert row["sampling/sampling_logp_difference/max"] > 0.05
