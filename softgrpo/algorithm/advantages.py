"""Group-relative advantages."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards_S: Tensor, group_S: Tensor, kind: str) -> Tensor:
    """Advantage of each sample against the other samples of its group, float32 [S].

    rewards_S: float [S], one reward a sample. group_S: int [S]. kind:

    - ``grpo``: (R - mean) / (std + 1e-6), unbiased std (GRPO, arXiv 2402.03300)
    - ``dr_grpo``: R - mean (Dr.GRPO, arXiv 2503.20783)
    - ``loo``: R - mean of the others (RLOO, arXiv 2402.14740)

    A sample whose reward is NaN (the reward could not be computed) gets 0 and counts in no mean.
    """
    rewards = rewards_S.double()
    advantages = torch.zeros_like(rewards)
    for index in group_S.unique():
        members = (group_S == index) & ~rewards.isnan()
        scored = rewards[members]
        if len(scored) < 2:
            continue
        centred = scored - scored.mean()
        if kind == "grpo":
            centred = centred / (scored.std() + 1e-6)
        elif kind == "loo":
            centred = centred * (len(scored) / (len(scored) - 1))
        elif kind != "dr_grpo":
            raise ValueError(f"unknown advantage {kind!r}; known: grpo, dr_grpo, loo")
        # Equal rewards must give exactly 0: rounding of the mean divided by 1e-6 would not.
        if bool((scored != scored[0]).any()):
            advantages[members] = centred
    return advantages.float()


def groups_with_spread(rewards_S: Tensor, group_S: Tensor) -> list[int]:
    """The groups, ascending, whose scored samples do not all have the same reward."""
    useful = []
    for index in group_S.unique().tolist():
        scored = rewards_S[(group_S == index) & ~rewards_S.isnan()]
        if len(scored) and bool((scored != scored[0]).any()):
            useful.append(int(index))
    return useful


def overlong_penalty(response_lens_S: Tensor, max_new_tokens: int, buffer: int) -> Tensor:
    """What a response loses for its length, [S] in [-1, 0] (DAPO, arXiv 2503.14476).

    0 up to max_new_tokens - buffer tokens, from there linearly down to -1 at max_new_tokens.
    response_lens_S: int [S]. buffer: tokens; 0 means no penalty.
    """
    if buffer == 0:
        return torch.zeros(len(response_lens_S))
    over = response_lens_S.float() - (max_new_tokens - buffer)
    return -(over / buffer).clamp(0.0, 1.0)
