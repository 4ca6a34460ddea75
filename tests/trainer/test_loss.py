"""Advantages and the clipped loss against plain numpy."""

import numpy as np
import pytest
import torch

from softgrpo.advantages import group_advantages
from softgrpo.loss import policy_loss

GROUP = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.25, float("nan"), 0.75])


def numpy_advantages(kind):
    result = np.zeros(9)
    for g in range(3):
        members = [i for i in range(9) if GROUP[i] == g and not np.isnan(REWARDS[i].item())]
        r = np.array([REWARDS[i].item() for i in members])
        for i, x in zip(members, r, strict=True):
            if kind == "grpo":
                result[i] = (x - r.mean()) / (r.std(ddof=1) + 1e-6)
            elif kind == "dr_grpo":
                result[i] = x - r.mean()
            else:
                result[i] = x - (r.sum() - x) / (len(r) - 1)
    return result


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "loo"])
def test_advantages_equal_numpy(kind):
    ours = group_advantages(REWARDS, GROUP, kind)
    np.testing.assert_allclose(ours.numpy(), numpy_advantages(kind), rtol=1e-6, atol=1e-6)
    assert ours[7] == 0  # the sample that could not be scored


def test_equal_rewards_give_exactly_zero():
    """0.1 has no exact mean of three: a rounding error over std + 1e-6 would be an advantage."""
    ours = group_advantages(torch.full((3,), 0.1), torch.zeros(3), "grpo")
    assert ours.tolist() == [0.0, 0.0, 0.0]


def test_unknown_advantage_is_named():
    with pytest.raises(ValueError, match="gae"):
        group_advantages(REWARDS, GROUP, "gae")


def numpy_loss(new, old, advantages, weights, low, high, dual, kl, reference):
    total = 0.0
    for n, o, a, w, r in zip(new, old, advantages, weights, reference, strict=True):
        ratio = np.exp(n - o)
        term = min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
        if a < 0:
            term = max(term, dual * a)
        total += w * (-term + kl * (np.exp(r - n) - (r - n) - 1))
    return total


def test_policy_loss_equals_numpy_in_every_region():
    generator = torch.Generator().manual_seed(0)
    n = 400
    old = torch.randn(n, generator=generator, dtype=torch.float64)
    new = (old + torch.randn(n, generator=generator, dtype=torch.float64)).requires_grad_()
    reference = old + 0.1 * torch.randn(n, generator=generator, dtype=torch.float64)
    advantages = torch.randn(n, generator=generator, dtype=torch.float64)
    weights = torch.rand(n, generator=generator, dtype=torch.float64)
    result = policy_loss(
        new,
        old,
        advantages,
        weights,
        clip_low=0.2,
        clip_high=0.3,
        dual_clip=3.0,
        kl_coef=0.05,
        reference_T=reference,
    )
    arrays = [x.detach().numpy() for x in (new, old, advantages, weights)]
    expected = numpy_loss(*arrays, 0.2, 0.3, 3.0, 0.05, reference.numpy())
    assert abs(result.loss.item() - expected) < 1e-9
    # All regions are reached: clipped above, below, dual clip.
    ratio = torch.exp(new - old).detach()
    assert result.clipped_high.any()
    assert result.clipped_low.any()
    assert ((advantages < 0) & (ratio > 3)).any()


def test_gradient_is_zero_where_clipped():
    new = torch.tensor([0.5, -0.5, 0.5, 2.0], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, -1.0, -1.0])
    loss = policy_loss(
        new,
        torch.zeros(4),
        advantages,
        torch.ones(4),
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=3.0,
    ).loss
    loss.backward()
    gradient = new.grad.tolist()
    assert gradient[0] == 0  # rewarded and already more likely
    assert gradient[1] == 0  # punished and already less likely
    assert gradient[2] > 0  # punished and more likely: pushed down
    assert gradient[3] == 0  # dual clip: e^2 > 3


def test_a_masked_infinite_token_does_not_reach_the_sum():
    new = torch.tensor([0.0, float("inf")], requires_grad=True)
    result = policy_loss(
        new,
        torch.zeros(2),
        torch.ones(2),
        torch.tensor([1.0, 0.0]),
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=3.0,
    )
    assert result.loss.item() == -1.0
