"""The clipped policy loss on per-position log-densities (ALGORITHM.md section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from softgrpo.config.sections import AlgorithmConfig

# Where exp is continued by its tangent: e^20 is 5e8, and a sum of such terms has room in float32.
MAX_EXPONENT = 20.0


@dataclass(frozen=True)
class PolicyLoss:
    """loss: scalar, already weighted, summed over what was given. The rest: detached [T]."""

    loss: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    kl: Tensor | None


def loss_mask(forced_T: Tensor, cut_T: Tensor, mask_truncated: bool) -> Tensor:
    """Which tokens are learnt from, bool [T]: those that were chosen, not put there by a budget.

    forced_T: bool [T]. cut_T: bool [T], in a response that the length limit cut; with
    mask_truncated these are left out (overlong filtering of DAPO, arXiv 2503.14476), though its
    reward counts in its group all the same.
    """
    return ~(forced_T | cut_T) if mask_truncated else ~forced_T


def token_weights(
    mask_T: Tensor, sample_T: Tensor, num_samples: int, aggregation: str, max_new_tokens: int
) -> Tensor:
    """Weight [T] of each token's loss, so that a weighted sum is the loss of the whole batch.

    mask_T: bool [T], see `loss_mask`. sample_T: int64 [T], the sample of each, of num_samples.

    ``token``: mean over the tokens of the batch. ``sequence``: mean over samples of the mean over
    their tokens. ``constant``: sum / (samples * max_new_tokens) (Dr.GRPO). Masked tokens weigh 0.
    """
    mask = mask_T.float()
    if aggregation == "token":
        return mask / mask.sum().clamp(min=1.0)
    if aggregation == "constant":
        return mask / (num_samples * max_new_tokens)
    if aggregation != "sequence":
        raise ValueError(
            f"unknown loss_aggregation {aggregation!r}; known: token, sequence, constant"
        )
    counts = torch.zeros(num_samples).index_add_(0, sample_T, mask)
    return mask / (counts.clamp(min=1.0)[sample_T] * num_samples)


def bounded_exp(x: Tensor) -> Tensor:
    """exp(x), continued beyond x = 20 by its tangent there; differentiable.

    No value and no gradient overflows, where exp does from 88 on (float32): times an advantage or a
    weight of 0 it would be NaN. It grows and pulls as exp does, by e^20 at most. PPO's clip or its
    dual clip already has no gradient there; only without `dual_clip`, and in ``k3``, does a bound
    replace a gradient of more than e^20, which `optim.grad_clip` would scale down all the same.
    """
    return x.clamp(max=MAX_EXPONENT).exp() * (1.0 + F.relu(x - MAX_EXPONENT))


def policy_loss(
    new_T: Tensor,
    old_T: Tensor,
    advantages_T: Tensor,
    weights_T: Tensor,
    sample_T: Tensor,
    num_samples: int,
    algorithm: AlgorithmConfig,
    *,
    correction_T: Tensor | None = None,
    reference_T: Tensor | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate with dual clip (arXiv 1912.09729), and a KL penalty.

    new_T, old_T, reference_T: log-densities [T] of the current, the sampling and the frozen
    reference policy. advantages_T, weights_T: float32 [T]. sample_T: int64 [T], the sample of each
    token, of num_samples. correction_T: weights of the surrogate (correction.py). Where the
    advantage is negative the surrogate is at least `dual_clip` times it.

    A token of weight 0 counts in nothing. Where each slot of a position has a ratio of its own
    (`Method.per_slot`), a token here is such a slot, its weight that of the position times how
    often the slot counts (Multiplex Thinking, arXiv 2601.08808, sums over the slots).
    """
    counted_T = weights_T > 0
    log_ratio_T = torch.where(counted_T, new_T - old_T, 0.0)
    if algorithm.ratio_level == "sequence":
        log_ratio_T = _sample_means(log_ratio_T, counted_T, sample_T, num_samples)
    ratio = bounded_exp(log_ratio_T)
    low, high = 1.0 - algorithm.clip_low, 1.0 + algorithm.clip_high
    surrogate = torch.minimum(ratio * advantages_T, ratio.clamp(low, high) * advantages_T)
    negative = advantages_T < 0
    if algorithm.dual_clip is not None:
        bounded = torch.maximum(surrogate, algorithm.dual_clip * advantages_T)
        surrogate = torch.where(negative, bounded, surrogate)
    loss_T = -surrogate if correction_T is None else -surrogate * correction_T
    kl = None
    if reference_T is not None:
        new_T, reference_T = (torch.where(counted_T, x, 0.0) for x in (new_T, reference_T))
        kl_T = kl_penalty(new_T, reference_T, algorithm.kl_estimator)
        loss_T = loss_T + algorithm.kl_coef * kl_T
        kl = kl_T.detach()
    ratio = ratio.detach()
    return PolicyLoss(
        # What has no weight is 0 before every exp, where an overflow would make 0 * inf of its
        # gradient; here the correction of one that is not finite must not reach the sum.
        loss=torch.where(counted_T, loss_T * weights_T, 0.0).sum(),
        ratio=ratio,
        clipped_low=(ratio < low) & negative,
        clipped_high=(ratio > high) & (advantages_T > 0),
        kl=kl,
    )


def kl_estimator(
    chosen: Literal["auto", "k1", "k2", "k3"], heavy_tailed: bool
) -> Literal["k1", "k2", "k3"]:
    """`auto` is k3, as GRPO has it, but k2 where the density is heavy-tailed
    (`Method.heavy_tailed`): the variance of exp(-d) is then infinite at positions where the policy
    has doubled a candidate's probability, while every moment of d is finite."""
    if chosen != "auto":
        return chosen
    return "k2" if heavy_tailed else "k3"


def kl_penalty(new_T: Tensor, reference_T: Tensor, estimator: str) -> Tensor:
    """Estimate [T] of KL(policy || reference) at positions sampled from the policy.

    With d = log policy - log reference (Schulman 2020, joschu.net/blog/kl-approx.html):

    - ``k1``: d. Unbiased, of either sign.
    - ``k2``: d^2 / 2. Low variance, biased by O(d^3).
    - ``k3``: exp(-d) - 1 + d. Unbiased, never negative.

    The derivative of an estimate is not an estimate of the derivative (arXiv 2506.09477): that of
    d alone has mean 0. What pulls the policy here, in expectation on policy:

    - ``k1``, ``k2``: d * grad log policy, the gradient of KL(policy || reference) at each position.
      For k1 this is what the penalty would do as a part of the reward of its position; for k2 it is
      the plain derivative. They differ in the value that is reported.
    - ``k3``: (1 - exp(-d)) * grad log policy, the gradient of KL(reference || policy). GRPO and the
      paper's runs have it. The two agree to first order in d.
    """
    d = new_T - reference_T
    if estimator == "k1":
        return d.detach() * (1.0 + new_T - new_T.detach())
    if estimator == "k2":
        return 0.5 * d.square()
    if estimator == "k3":
        return bounded_exp(-d) - 1.0 + d
    raise ValueError(f"unknown kl_estimator {estimator!r}; known: k1, k2, k3")


def _sample_means(
    values_T: Tensor, counted_T: Tensor, sample_T: Tensor, num_samples: int
) -> Tensor:
    """At each token the mean over the counted tokens of its sample (GSPO, arXiv 2507.18071)."""
    sums = values_T.new_zeros(num_samples).index_add(0, sample_T, values_T)
    counts = values_T.new_zeros(num_samples).index_add(0, sample_T, counted_T.to(values_T.dtype))
    return (sums / counts.clamp(min=1.0))[sample_T]
