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
