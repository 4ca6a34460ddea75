"""Methods whose drawn slots have ratios of their own: clip, dual clip and KL of every slot, summed
over the slots of a position (Multiplex Thinking, arXiv 2601.08808)."""

import numpy as np
import pytest
import torch
from tiny_decoder import make_decoder

from softgrpo.algorithm.positions import DensitySettings
from softgrpo.config.sections import AlgorithmConfig, OptimConfig, Sections
from softgrpo.distributed import World
from softgrpo.learner.optimizer import make_optimizer
from softgrpo.learner.passes import Passes
from softgrpo.learner.policy import Policy
from softgrpo.learner.update import Update
from softgrpo.rollout.batch import RolloutBatch
from softgrpo_engine import LLM, SamplingParams, SoftParams
from softgrpo_kernels.methods.gumbel import Gumbel
from softgrpo_kernels.methods.method import live_slots

GROUPS, SAMPLES, K = 2, 4, 5
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -1.0, -0.5, -0.5])


class TwiceTheFirst(Gumbel):
    """log q of every live slot, that of the first twice."""

    per_slot = True

    def slot_terms(self, logq, gprime, rollout):
        logq, _, live = live_slots(logq, gprime)
        counts = live.to(logq.dtype)
        counts[:, 0] *= 2
        return logq, counts


SETTINGS = DensitySettings(TwiceTheFirst())


@pytest.fixture(scope="module")
def batch():
    """Soft positions, then an answer over recorded candidates; a budget forced some of the ends."""
    engine = LLM(make_decoder(), kv_memory=0.01, max_batch_size=16)
    uids = [[10 * g + s for s in range(SAMPLES)] for g in range(GROUPS)]
    outputs = engine.generate_groups(
        [[5, 6, 7], [5, 6]],
        SamplingParams(max_tokens=9, top_k=K, top_p=0.9),
        SoftParams(top_k=K, top_p=0.9, end_of_thinking=2, max_soft_tokens=4),
        seed=3,
        uids=uids,
    )
    return RolloutBatch.from_outputs(outputs, seed=3, stream=0, weight_version=0)


def config_of(**algorithm):
    return Sections(
        algorithm=AlgorithmConfig(loss_aggregation="sequence", **algorithm),
        optim=OptimConfig(grad_clip=1e9),
    )


def weights(batch):
    """A sequence-mean weight [T], 0 where the token was forced."""
    chosen = ~batch.soft.forced.bool()
    counts = torch.zeros(len(batch.group)).index_add_(0, batch.sample_of_token, chosen.float())
    return chosen / (counts[batch.sample_of_token] * len(batch.group))


def assert_same_gradient(policy, plain):
    gradients = [
        (ours.grad, theirs.grad)
        for ours, theirs in zip(policy.parameters(), plain.parameters(), strict=True)
    ]
    assert any(theirs.abs().max() > 1e-3 for _, theirs in gradients)
    for ours, theirs in gradients:
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-6)


def test_other_positions_have_one_term(batch):
    scored = Policy(make_decoder(), SETTINGS, torch.float32)(batch)
    soft = batch.soft.kind.bool()
    assert 0 < soft.sum() < len(soft)
    assert batch.soft.forced.any()
    assert scored.counts.shape == (len(soft), K)
    assert (scored.counts[~soft] == torch.tensor([1.0, 0, 0, 0, 0])).all()
    assert (scored.terms[~soft, 1:] == 0).all()
    live = (batch.soft.ids[soft] >= 0).float()
    assert 0 < live.mean() < 1
    torch.testing.assert_close(scored.counts[soft], live + torch.eye(K)[0])
    one_term = Policy(make_decoder(), DensitySettings(), torch.float32)(batch)
    assert one_term.counts.shape == (len(soft), 1)
    assert torch.equal(scored.density[~soft], one_term.density[~soft])


def test_on_policy_the_gradient_is_that_of_the_summed_density(batch):
    policy, plain = (Policy(make_decoder(), SETTINGS, torch.float32) for _ in range(2))
    config = config_of()
    row, taken = Update(policy, None, make_optimizer(policy.decoder, config.optim))(
        batch, ADVANTAGES, 1e-6, config
    )
    assert taken == 1
    assert row["clip_ratio/region_mean"] == 0.0
    scale = weights(batch) * ADVANTAGES[batch.sample_of_token]
    (-scale * plain(batch).density).sum().backward()
    assert_same_gradient(policy, plain)


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_off_policy_every_slot_is_clipped_by_itself(batch, kl_coef):
    config = config_of(kl_coef=kl_coef, kl_estimator="k3", clip_high=0.3)
    policy, plain = (Policy(make_decoder(), SETTINGS, torch.float32) for _ in range(2))
    reference = Policy(make_decoder(), SETTINGS, torch.float32) if kl_coef else None
    passes = Passes(policy, reference, batch, config, World())
    samples = list(range(GROUPS * SAMPLES))
    old = passes.densities(samples)
    torch.manual_seed(1)
    with torch.no_grad():  # a minibatch before this one
        for ours, theirs in zip(policy.parameters(), plain.parameters(), strict=True):
            ours.add_(0.05 * torch.randn_like(ours))
            theirs.copy_(ours)
    passes.backward(samples, samples, ADVANTAGES, old)

    scored = plain(batch)
    new, counts, old_TC = (
        x.detach().double().numpy() for x in (scored.terms, scored.counts, old[0])
    )
    weight, advantage = weights(batch).numpy(), ADVANTAGES[batch.sample_of_token].numpy()
    slope, loss, regions = np.zeros_like(new), 0.0, np.zeros(4)
    for t, slot in np.argwhere(counts * weight[:, None] > 0):
        a, ratio = advantage[t], np.exp(new[t, slot] - old_TC[t, slot])
        # Clipped above, clipped below, dual clip, none of them.
        flat = [a > 0 and ratio > 1.3, a < 0 and ratio < 0.8, a < 0 and ratio > 3.0]
        bound = [1.3 * a, 0.8 * a, 3.0 * a, ratio * a]
        region = flat.index(True) if any(flat) else 3
        regions[region] += 1
        d = new[t, slot] - old_TC[t, slot]  # the reference has the sampling weights
        scale = weight[t] * counts[t, slot]
        loss += scale * (-bound[region] + kl_coef * (np.exp(-d) - 1 + d))
        slope[t, slot] = scale * (-ratio * a * (region == 3) + kl_coef * (1 - np.exp(-d)))
    assert (regions > 0).all()
    (torch.tensor(slope).float() * scored.terms).sum().backward()
    assert_same_gradient(policy, plain)
    summaries = passes.statistics.summaries()
    assert summaries["loss"].total == pytest.approx(loss, rel=1e-4)
    assert summaries["clip_ratio/high_mean"].count == (counts > 0).sum()
    assert summaries["clip_ratio/high_mean"].total == regions[0]
    if kl_coef:
        assert summaries["kl"].count == (weight > 0).sum() < len(new)
