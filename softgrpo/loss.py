"""The clipped policy loss on per-position log-densities (ALGORITHM.md section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softgrpo.batch import RolloutBatch


@dataclass(frozen=True)
class PolicyLoss:
    """loss: scalar, already weighted, summed over the tokens given. The rest: detached [T]."""

    loss: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    kl: Tensor | None


def token_weights(
    batch: RolloutBatch, mask_T: Tensor, aggregation: str, max_new_tokens: int
) -> Tensor:
    """Weight [T] of each token's loss, so that a weighted sum is the loss of the whole batch.

    ``token``: mean over the tokens of the batch. ``sequence``: mean over samples of the mean over
    their tokens. ``constant``: sum / (samples * max_new_tokens) (Dr.GRPO). Masked tokens weigh 0.
    """
    mask = mask_T.float()
    if aggregation == "token":
        return mask / mask.sum().clamp(min=1.0)
    samples = len(batch.group)
    if aggregation == "constant":
        return mask / (samples * max_new_tokens)
    if aggregation != "sequence":
        raise ValueError(
            f"unknown loss_aggregation {aggregation!r}; known: token, sequence, constant"
        )
    owner = batch.sample_of_token
    counts = torch.zeros(samples).index_add_(0, owner, mask)
    return mask / (counts.clamp(min=1.0)[owner] * samples)


def policy_loss(
    new_T: Tensor,
    old_T: Tensor,
    advantages_T: Tensor,
    weights_T: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    kl_coef: float = 0.0,
    reference_T: Tensor | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate with dual clip (arXiv 1912.09729) and a k3 KL penalty.

    new_T, old_T, reference_T: log-densities [T] of the current, the sampling and the frozen
    reference policy. advantages_T, weights_T: float32 [T]. dual_clip: bound on the ratio where the
    advantage is negative, None for none.
    """
    ratio = torch.exp(new_T - old_T)
    unclipped = ratio * advantages_T
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages_T
    surrogate = torch.minimum(unclipped, clipped)
    negative = advantages_T < 0
    if dual_clip is not None:
        bounded = torch.maximum(surrogate, dual_clip * advantages_T)
        surrogate = torch.where(negative, bounded, surrogate)
    loss_T = -surrogate
    kl = None
    if reference_T is not None:
        difference = reference_T - new_T
        kl_T = torch.exp(difference) - difference - 1.0
        loss_T = loss_T + kl_coef * kl_T
        kl = kl_T.detach()
    ratio = ratio.detach()
    return PolicyLoss(
        # 0 * inf is NaN: a token of weight 0 must not reach the sum.
        loss=torch.where(weights_T > 0, loss_T * weights_T, 0.0).sum(),
        ratio=ratio,
        clipped_low=(ratio < 1.0 - clip_low) & negative,
        clipped_high=(ratio > 1.0 + clip_high) & (advantages_T > 0),
        kl=kl,
    )
