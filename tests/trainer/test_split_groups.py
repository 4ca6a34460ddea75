"""A group split over passes has the gradient of the whole: its prompt is only computed again."""

from itertools import pairwise

import pytest
import torch
from tiny_decoder import make_decoder

from softgrpo.algorithm.positions import DensitySettings
from softgrpo.config.sections import AlgorithmConfig, CorrectionConfig, OptimConfig, Sections
from softgrpo.learner import passes
from softgrpo.learner.policy import Policy
from softgrpo.learner.update import Update
from softgrpo.rollout.batch import RolloutBatch
from softgrpo_engine import LLM, SamplingParams, SoftParams

GROUPS, SAMPLES = 4, 3
SETTINGS = DensitySettings(max_soft_tokens=4)
# The second group has no spread, and one sample of the third is as good as their mean.
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, 0.0, 0.0, 0.0, 1.0, 0.0, -1.0, 2.0, -1.0, -0.5])
KL = AlgorithmConfig(kl_coef=0.5, loss_aggregation="token")
CASES = {
    "tokens": (True, AlgorithmConfig(loss_aggregation="token", mask_truncated=True)),
    "untied, KL": (False, KL),
    "tied, KL": (True, KL),
    "ratio of a sequence": (False, AlgorithmConfig(ratio_level="sequence")),
    "correction of a sequence": (
        True,
        AlgorithmConfig(
            loss_aggregation="constant",
            correction=CorrectionConfig("truncate", "sequence", 1.2),
            clip_low=0.01,
            clip_high=0.01,
        ),
    ),
}


@pytest.fixture(scope="module")
def batch():
    """Written by an engine whose embeddings are a little off: soft positions, forced ends, answers,
    some of them cut."""
    decoder = make_decoder()
    with torch.no_grad():
        decoder.embed_weight.add_(0.02 * torch.randn_like(decoder.embed_weight))
    engine = LLM(decoder, kv_memory=0.01, max_batch_size=16)
    uids = [[10 * g + s for s in range(SAMPLES)] for g in range(GROUPS)]
    prompts = [[5, 6, 7, 8, 9][: 2 + g] for g in range(GROUPS)]
    params = SamplingParams(max_tokens=12, top_k=6, top_p=0.9)
    soft = SoftParams(top_k=5, end_of_thinking=2, max_soft_tokens=4)
    outputs = engine.generate_groups(prompts, params, soft, seed=3, uids=uids)
    batch = RolloutBatch.from_outputs(outputs, seed=3, stream=0, weight_version=0)
    assert batch.soft.forced.any()
    assert 0 < batch.is_cut.sum() < len(batch.is_cut)
    return batch


def partition(samples, generator):
    """Parts of one to all of the samples, in any order, and an empty one."""
    order = torch.randperm(len(samples), generator=generator).tolist()
    cuts = torch.randint(0, len(samples), (3,), generator=generator).tolist()
    bounds = [0, *sorted(cuts), len(samples)]
    parts = [[samples[i] for i in order[a:b]] for a, b in pairwise(bounds)]
    return [*parts, []]


def updated(batch, tied, algorithm):
    """Metrics of two minibatches and the gradient of the second, whose ratios are not 1. Plain
    descent, for Adam makes a step of full size of a rounding."""
    policy, frozen = (
        Policy(make_decoder(tie_word_embeddings=tied), SETTINGS, torch.float32) for _ in range(2)
    )
    with torch.no_grad():
        frozen.requires_grad_(False).decoder.embed_weight.mul_(1.05)
    reference = frozen if algorithm.kl_coef else None
    optimizer = torch.optim.SGD(policy.decoder.parameters(), lr=0.0)
    config = Sections(algorithm=algorithm, optim=OptimConfig(minibatch_prompts=2, grad_clip=1e9))
    row, taken = Update(policy, reference, optimizer)(batch, ADVANTAGES, 0.1, config)
    assert taken == 2
    gradients = {name: p.grad.clone() for name, p in policy.decoder.named_parameters()}
    return row, gradients


@pytest.mark.parametrize("name", CASES)
def test_any_split_equals_the_whole(name, batch, monkeypatch):
    tied, algorithm = CASES[name]
    row, gradients = updated(batch, tied, algorithm)
    assert row["clip_ratio/region_mean"] > 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        monkeypatch.setattr(
            passes, "microbatches", lambda batch, samples, *_: partition(samples, generator)
        )
        parts_row, parts = updated(batch, tied, algorithm)
        assert parts_row == pytest.approx(row, rel=1e-4, abs=1e-6)
        for weight, gradient in gradients.items():
            assert (parts[weight] - gradient).abs().max() < 2e-5 * gradient.abs().max(), weight
