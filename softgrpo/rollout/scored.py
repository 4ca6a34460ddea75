"""Groups of samples with their rewards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softgrpo.algorithm.advantages import groups_with_spread
from softgrpo.data.prompts import Prompt
from softgrpo_engine import Output


@dataclass(frozen=True)
class ScoredRollout:
    """Groups of samples with their rewards: one output a prompt, all of the same group size.

    rewards_S: float32 [S], NaN where not scored. by_function: the rewards of each function [S].
    weight_versions: of the weights that drew each output. seconds: that this process sampled for.
    """

    prompts: list[Prompt]
    outputs: list[Output]
    rewards_S: Tensor
    by_function: dict[str, Tensor]
    weight_versions: list[int]
    seconds: float

    @property
    def useful_groups(self) -> list[int]:
        """The groups whose rewards are not all the same."""
        return groups_with_spread(self.rewards_S, self._group_S)

    @property
    def num_tokens(self) -> int:
        return sum(len(sample.token_ids) for output in self.outputs for sample in output.samples)

    def choose(self, count: int) -> ScoredRollout:
        """At most count groups in the order drawn: the useful ones first, then others to fill up
        (dynamic sampling of DAPO, arXiv 2503.14476, with a batch of constant size)."""
        useful = self.useful_groups
        others = [g for g in range(len(self.outputs)) if g not in set(useful)]
        groups = sorted((useful + others)[:count])
        samples = torch.isin(self._group_S, torch.tensor(groups))
        return ScoredRollout(
            [self.prompts[g] for g in groups],
            [self.outputs[g] for g in groups],
            self.rewards_S[samples],
            {name: rewards[samples] for name, rewards in self.by_function.items()},
            [self.weight_versions[g] for g in groups],
            self.seconds,
        )

    def __add__(self, other: ScoredRollout) -> ScoredRollout:
        return ScoredRollout(
            self.prompts + other.prompts,
            self.outputs + other.outputs,
            torch.cat([self.rewards_S, other.rewards_S]),
            {
                name: torch.cat([rewards, other.by_function[name]])
                for name, rewards in self.by_function.items()
            },
            self.weight_versions + other.weight_versions,
            self.seconds + other.seconds,
        )

    @property
    def _group_S(self) -> Tensor:
        sizes = torch.tensor([len(output.samples) for output in self.outputs])
        return torch.repeat_interleave(torch.arange(len(sizes)), sizes)
