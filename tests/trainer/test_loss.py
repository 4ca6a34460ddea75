"""Advantages and the clipped loss against plain numpy."""

import numpy as np
import pytest
import torch

from softgrpo.algorithm.advantages import group_advantages, groups_with_spread, overlong_penalty
from softgrpo.algorithm.loss import (
    bounded_exp,
    kl_penalty,
    loss_mask,
    policy_loss,
    token_weights,
)
from softgrpo.config.sections import AlgorithmConfig

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


def test_groups_with_spread():
    assert groups_with_spread(REWARDS, GROUP) == [0, 2]
    rewards = torch.tensor([float("nan"), 1.0, float("nan"), float("nan")])
    assert groups_with_spread(rewards, torch.tensor([0, 0, 1, 1])) == []


def test_overlong_penalty_equals_the_formula_of_dapo():
    """Soft overlong punishment of arXiv 2503.14476, with L_max = 100 and L_cache = 20."""
    lens = [0, 79, 80, 81, 90, 99, 100]
    expected = []
    for n in lens:
        if n <= 100 - 20:
            expected.append(0.0)
        elif n <= 100:
            expected.append(((100 - 20) - n) / 20)
        else:
            expected.append(-1.0)
    ours = overlong_penalty(torch.tensor(lens), 100, 20)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    assert not overlong_penalty(torch.tensor(lens), 100, 0).any()


# --- the loss -----------------------------------------------------------------------------------


OLD, NEW, REFERENCE, ADVANTAGE, WEIGHT = np.random.default_rng(0).normal(size=(5, 400))
NEW = OLD + NEW
REFERENCE = OLD + 0.1 * REFERENCE
WEIGHT = np.abs(WEIGHT)
SAMPLE = np.sort(np.random.default_rng(1).integers(0, 60, size=400))
# One advantage a sample, as in training; token 7 is masked.
ADVANTAGE = ADVANTAGE[SAMPLE]
WEIGHT[7] = 0.0


def run(algorithm, new=NEW, **extra):
    """The loss of our code on the arrays above, and its gradient in new."""
    leaf = torch.tensor(new, requires_grad=True)
    old, advantage, weight = (torch.tensor(x) for x in (OLD, ADVANTAGE, WEIGHT))
    extra = {name: torch.tensor(x) for name, x in extra.items()}
    result = policy_loss(
        leaf, old, advantage, weight, torch.tensor(SAMPLE), max(SAMPLE) + 1, algorithm, **extra
    )
    result.loss.backward()
    return result, leaf.grad.numpy()


def numpy_surrogate(ratio, a, low, high, dual):
    """PPO's clipped surrogate of one position."""
    term = min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
    return max(term, dual * a) if a < 0 and dual is not None else term


def test_policy_loss_equals_numpy_in_every_region():
    algorithm = AlgorithmConfig(
        clip_low=0.2, clip_high=0.3, dual_clip=3.0, kl_coef=0.05, kl_estimator="k3"
    )
    result, _ = run(algorithm, reference_T=REFERENCE)
    expected = 0.0
    for new, old, a, w, ref in zip(NEW, OLD, ADVANTAGE, WEIGHT, REFERENCE, strict=True):
        ratio, d = np.exp(new - old), new - ref
        expected += w * (-numpy_surrogate(ratio, a, 0.2, 0.3, 3.0) + 0.05 * (np.exp(-d) - 1 + d))
    assert result.loss.item() == pytest.approx(expected, rel=1e-12)
    # All regions are reached: clipped above, below, dual clip.
    ratio = np.exp(NEW - OLD)
    assert result.clipped_high.any()
    assert result.clipped_low.any()
    assert ((ADVANTAGE < 0) & (ratio > 3)).any()


def test_sequence_level_ratio_equals_numpy():
    """GSPO (arXiv 2507.18071): s_i = (pi_new(y_i) / pi_old(y_i))^(1 / |y_i|)."""
    algorithm = AlgorithmConfig(
        ratio_level="sequence", loss_aggregation="sequence", clip_low=0.1, clip_high=0.2
    )
    samples, counts = np.unique(SAMPLE, return_counts=True)
    weight = 1.0 / (counts[np.searchsorted(samples, SAMPLE)] * len(samples))

    def loss(new):
        total = 0.0
        for i in samples:
            tokens = i == SAMPLE
            s = np.exp((new[tokens] - OLD[tokens]).sum() / tokens.sum())
            total -= numpy_surrogate(s, ADVANTAGE[tokens][0], 0.1, 0.2, 3.0) / len(samples)
        return total

    leaf = torch.tensor(NEW, requires_grad=True)
    old, advantage, weight = (torch.tensor(x) for x in (OLD, ADVANTAGE, weight))
    result = policy_loss(
        leaf, old, advantage, weight, torch.tensor(SAMPLE), max(SAMPLE) + 1, algorithm
    )
    result.loss.backward()
    assert result.loss.item() == pytest.approx(loss(NEW), rel=1e-12)
    for t in (0, 100, 399):
        step = np.zeros(400)
        step[t] = 1e-6
        numeric = (loss(NEW + step) - loss(NEW - step)) / 2e-6
        assert leaf.grad[t].item() == pytest.approx(numeric, rel=1e-5, abs=1e-10)


def test_a_masked_token_is_in_no_ratio():
    algorithm = AlgorithmConfig(ratio_level="sequence", loss_aggregation="sequence")
    moved = NEW.copy()
    moved[7] += 50.0
    (one, gradient), (other, _) = run(algorithm), run(algorithm, moved)
    assert one.loss.item() == other.loss.item()
    assert gradient[7] == 0.0


def test_correction_weighs_the_surrogate_and_not_the_kl():
    algorithm = AlgorithmConfig(kl_coef=0.1, kl_estimator="k3")
    correction = np.random.default_rng(2).uniform(size=400)
    result, _ = run(algorithm, reference_T=REFERENCE, correction_T=correction)
    expected = 0.0
    for i in range(400):
        d = NEW[i] - REFERENCE[i]
        surrogate = numpy_surrogate(np.exp(NEW[i] - OLD[i]), ADVANTAGE[i], 0.2, 0.2, 3.0)
        expected += WEIGHT[i] * (-correction[i] * surrogate + 0.1 * (np.exp(-d) - 1 + d))
    assert result.loss.item() == pytest.approx(expected, rel=1e-12)


VALUES = {"k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: np.exp(-d) - 1 + d}


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimates_and_what_their_gradients_pull_to(estimator):
    """Over all tokens of a small vocabulary, where expectations are sums."""
    rng = np.random.default_rng(3)
    logits, reference = rng.normal(size=(2, 9))
    p, q = (np.exp(x) / np.exp(x).sum() for x in (logits, reference))
    leaf = torch.tensor(logits, requires_grad=True)
    terms = kl_penalty(leaf.log_softmax(-1), torch.tensor(np.log(q)), estimator)
    np.testing.assert_allclose(terms.detach(), VALUES[estimator](np.log(p / q)), rtol=1e-12)
    # Sampled from the policy, each token's term counts p times: p is not differentiated.
    (torch.tensor(p) * terms).sum().backward()

    def divergence(z):
        policy = np.exp(z) / np.exp(z).sum()
        reverse = (policy * np.log(policy / q)).sum()
        return (q * np.log(q / policy)).sum() if estimator == "k3" else reverse

    numeric = [(divergence(logits + h) - divergence(logits - h)) / 2e-6 for h in 1e-6 * np.eye(9)]
    np.testing.assert_allclose(leaf.grad, numeric, atol=1e-8)
    if estimator != "k2":  # unbiased
        assert (p * terms.detach().numpy()).sum() == pytest.approx((p * np.log(p / q)).sum())


def test_unknown_kl_estimator_is_named():
    with pytest.raises(ValueError, match="k4"):
        kl_penalty(torch.zeros(1), torch.zeros(1), "k4")


def test_gradient_is_zero_where_clipped():
    new = torch.tensor([0.5, -0.5, 0.5, 2.0], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, -1.0, -1.0])
    loss = policy_loss(
        new, torch.zeros(4), advantages, torch.ones(4), torch.arange(4), 4, AlgorithmConfig()
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
        torch.zeros(2, dtype=torch.int64),
        1,
        AlgorithmConfig(ratio_level="sequence"),
    )
    assert result.loss.item() == -1.0
    result.loss.backward()
    assert new.grad.tolist() == [-1.0, 0.0]


def test_exp_is_bounded_only_where_it_would_overflow():
    x = torch.tensor([-1e4, -100.0, 0.3, 19.9, 20.0, 20.1, 21.0, 1e4], requires_grad=True)
    value = bounded_exp(x)
    value.sum().backward()
    below, e20 = x.detach()[:5].exp(), np.exp(20.0)
    assert torch.equal(value[:5], below)
    assert torch.equal(x.grad[:5], below)
    np.testing.assert_allclose(value[5:].detach(), e20 * np.array([1.1, 2.0, 9981.0]), rtol=1e-5)
    np.testing.assert_allclose(x.grad[5:], 3 * [e20], rtol=1e-6)


EXTREMES = {
    # log ratio, log policy - log reference, advantage, weight: the gradient in log policy
    "masked, unlike the reference": (0.0, -100.0, 1.0, 0.0, 0.0),
    "masked, unlike the old policy": (100.0, 0.0, -1.0, 0.0, 0.0),
    "no advantage": (100.0, 0.0, 0.0, 1.0, 0.0),
    "rewarded, clipped": (100.0, 0.0, 1.0, 1.0, 0.0),
    "punished, dual clip": (100.0, 0.0, -1.0, 1.0, 0.0),
    "gone": (-200.0, 0.0, 1.0, 1.0, 0.0),
    # Pulled towards the reference, as strongly as at d = -20.
    "unlike the reference": (0.0, -200.0, 0.0, 1.0, 1.0 - np.exp(20.0)),
    "much likelier than by the reference": (0.0, 200.0, 0.0, 1.0, 1.0),
}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", EXTREMES)
def test_nothing_overflows_at_the_extremes(name, level):
    log_ratio, d, advantage, weight, expected = EXTREMES[name]
    new, one = torch.zeros(1, requires_grad=True), torch.zeros(1, dtype=torch.int64)
    old, reference = torch.tensor([-log_ratio]), torch.tensor([-d])
    algorithm = AlgorithmConfig(ratio_level=level, kl_coef=1.0, kl_estimator="k3")
    result = policy_loss(
        new, old, torch.tensor([advantage]), torch.tensor([weight]), one, 1, algorithm,
        correction_T=torch.ones(1), reference_T=reference,
    )  # fmt: skip
    result.loss.backward()
    assert result.loss.isfinite()
    assert result.kl.isfinite().all()
    assert new.grad.item() == pytest.approx(expected, rel=1e-6)


# --- which tokens count, and how much -----------------------------------------------------------


def tokens_of(lens, cut=(), forced=()):
    """(forced, cut) bool [T] and the sample of every token, of samples of these lengths."""
    sample_T = torch.repeat_interleave(torch.arange(len(lens)), torch.tensor(lens))
    forced_T = torch.zeros(len(sample_T), dtype=torch.bool)
    forced_T[list(forced)] = True
    return forced_T, torch.isin(sample_T, torch.tensor(cut)), sample_T


def test_truncated_responses_and_forced_tokens_are_masked():
    forced_T, cut_T, _ = tokens_of([2, 3, 1], cut=[1], forced=[1])
    assert loss_mask(forced_T, cut_T, mask_truncated=False).tolist() == [1, 0, 1, 1, 1, 1]
    assert loss_mask(forced_T, cut_T, mask_truncated=True).tolist() == [1, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_aggregation_equals_numpy(aggregation):
    """Losses of masked samples are gone, but a masked sample is still one of the samples."""
    lens, limit = [2, 5, 1, 4], 6
    forced_T, cut_T, sample_T = tokens_of(lens, cut=[1], forced=[0])
    mask = loss_mask(forced_T, cut_T, mask_truncated=True)
    values = np.random.default_rng(0).normal(size=sum(lens))
    ours = (token_weights(mask, sample_T, len(lens), aggregation, limit).numpy() * values).sum()
    starts = np.cumsum([0, *lens])
    kept = [
        [values[t] for t in range(starts[i], starts[i + 1]) if mask[t]] for i in range(len(lens))
    ]
    flat = [x for sample in kept for x in sample]
    expected = {
        "token": sum(flat) / len(flat),
        "sequence": sum(sum(x) / len(x) for x in kept if x) / len(lens),
        "constant": sum(flat) / (len(lens) * limit),
    }
    assert ours == pytest.approx(expected[aggregation], rel=1e-6)
