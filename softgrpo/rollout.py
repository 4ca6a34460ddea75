"""Rollouts: which prompts, which noise keys, and the engine's answer as a RolloutBatch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softgrpo.advantages import groups_with_spread
from softgrpo.config import Config, ConfigError, RolloutConfig
from softgrpo.data import Prompt
from softgrpo.density import OFFICIAL_EPS, OFFICIAL_NOISE_CLIP
from softgrpo.distributed import World
from softgrpo.engines import RolloutEngine
from softgrpo.positions import DensitySettings
from softgrpo_engine import Output, SamplingParams, SoftParams
from softgrpo_engine.params import K_MAX

ROLLOUT_STREAM, EVALUATION_STREAM = 0, 1


def soft_params(rollout: RolloutConfig, objective: str) -> SoftParams | None:
    """Soft settings of the engine, None for discrete rollouts.

    `official` brings its own noise: clipped to [-1.5, 3] on log(p + 1e-6), every slot live.
    """
    soft = rollout.soft
    if not soft.enabled:
        return None
    official = objective == "official"
    return SoftParams(
        top_k=soft.top_k,
        top_p=soft.top_p,
        temperature=soft.temperature,
        tau=soft.tau,
        noise=soft.noise,
        noise_scale=soft.noise_scale,
        noise_clip=OFFICIAL_NOISE_CLIP if official else soft.noise_clip,
        eps=OFFICIAL_EPS if official else 0.0,
        end_of_thinking=soft.end_of_thinking,
        max_soft_tokens=soft.max_soft_tokens,
    )


def density_settings(config: Config) -> DensitySettings:
    """How the trainer scores what `soft_params` and `sampling_params` drew."""
    rollout, algorithm = config.rollout, config.algorithm
    candidates = 0 < rollout.top_k <= K_MAX
    if algorithm.discrete_logprob == "candidates" and not candidates:
        raise ConfigError(
            f"algorithm.discrete_logprob: 'candidates' needs rollout.top_k between 1 and {K_MAX}"
        )
    full = algorithm.discrete_logprob == "full" or not candidates
    return DensitySettings(
        objective=algorithm.objective,
        tau=rollout.soft.tau,
        noise=rollout.soft.noise,
        noise_scale=rollout.soft.noise_scale,
        soft_temperature=rollout.soft.temperature,
        discrete_temperature=rollout.temperature,
        discrete_full=full,
        discrete_listed=candidates,
        soft_enabled=rollout.soft.enabled,
        max_soft_tokens=rollout.soft.max_soft_tokens,
    )


def sampling_params(rollout: RolloutConfig) -> SamplingParams:
    """Settings of discrete positions and the length limit."""
    return SamplingParams(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_tokens=rollout.max_new_tokens,
    )


def rollout_uids(step: int, prompts: int, group_size: int) -> list[list[int]]:
    """Names of a step's samples: ((step * prompts + prompt) * group_size + sample) mod 2^32."""
    return [
        [((step * prompts + p) * group_size + s) % 2**32 for s in range(group_size)]
        for p in range(prompts)
    ]


def collect(
    engine: RolloutEngine,
    prompts: Sequence[list[int]],
    uids: list[list[int]],
    rollout: RolloutConfig,
    objective: str,
    *,
    seed: int,
    stream: int,
) -> list[Output]:
    """Samples every prompt once for each of its uids."""
    return engine.generate_groups(
        prompts,
        sampling_params(rollout),
        soft_params(rollout, objective) or False,
        seed=seed,
        uids=uids,
        stream=stream,
    )


@dataclass(frozen=True)
class ScoredRollout:
    """Groups of samples with their rewards: one output a prompt, all of the same group size.

    rewards_S: float32 [S], NaN where not scored. by_function: the rewards of each function [S].
    """

    prompts: list[Prompt]
    outputs: list[Output]
    rewards_S: Tensor
    by_function: dict[str, Tensor]

    def gathered(self, world: World) -> ScoredRollout:
        """Those of all processes together, in the order of ranks."""
        first, *others = world.gather(self)
        return sum(others, first)

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
        )

    @property
    def _group_S(self) -> Tensor:
        sizes = torch.tensor([len(output.samples) for output in self.outputs])
        return torch.repeat_interleave(torch.arange(len(sizes)), sizes)
