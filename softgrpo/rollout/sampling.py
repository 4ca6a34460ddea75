"""What an engine is asked for: how positions are drawn, and under which noise keys."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from softgrpo.algorithm.positions import DensitySettings
from softgrpo.config import Config, ConfigError
from softgrpo.config.rollout import RolloutConfig, SoftConfig
from softgrpo.rollout.engines import RolloutEngine
from softgrpo_engine import Output, SamplingParams, SoftParams
from softgrpo_engine.params import K_MAX
from softgrpo_kernels.methods import METHODS, method_of

ROLLOUT_STREAM, EVALUATION_STREAM = 0, 1


def soft_params(rollout: RolloutConfig, objective: str) -> SoftParams | None:
    """Soft settings of the engine, None for discrete rollouts."""
    soft = rollout.soft
    if not soft.enabled:
        return None
    method = method_of(soft.noise, objective)
    return SoftParams(
        top_k=soft.top_k,
        top_p=soft.top_p,
        temperature=soft.temperature,
        tau=soft.tau,
        weight_floor=soft.weight_floor,
        noise=soft.noise,
        noise_scale=soft.noise_scale,
        noise_clip=method.noise_clip or soft.noise_clip,
        eps=method.eps,
        end_of_thinking=soft.end_of_thinking,
        max_soft_tokens=soft.max_soft_tokens,
        min_soft_tokens=soft.min_soft_tokens,
    )


def density_settings(config: Config, soft: SoftConfig | None = None) -> DensitySettings:
    """How the trainer scores what `soft_params` and `sampling_params` drew.

    soft: the settings of the step (`config.schedule.soft_at`); None: those of `rollout.soft`.
    """
    rollout, algorithm, soft = config.rollout, config.algorithm, soft or config.rollout.soft
    candidates = 0 < rollout.top_k <= K_MAX
    if algorithm.discrete_logprob == "candidates" and not candidates:
        raise ConfigError(
            f"algorithm.discrete_logprob: 'candidates' needs rollout.top_k between 1 and {K_MAX}"
        )
    full = algorithm.discrete_logprob == "full" or not candidates
    return DensitySettings(
        method=method_of(soft.noise, algorithm.objective) if soft.enabled else METHODS[0],
        tau=soft.tau,
        weight_floor=soft.weight_floor,
        noise_scale=soft.noise_scale,
        soft_temperature=soft.temperature,
        discrete_temperature=rollout.temperature,
        discrete_full=full,
        discrete_listed=candidates,
        soft_enabled=soft.enabled,
        max_soft_tokens=soft.max_soft_tokens,
    )


def needs_kept_mass(config: Config) -> bool:
    """Whether tokens that are drawn from less than the vocabulary are scored over all of it: what
    the rollout's log p is there follows from the mass that it kept."""
    settings, rollout = density_settings(config), config.rollout
    cut = rollout.top_k > 0 or rollout.top_p < 1
    ends = settings.soft_enabled and settings.method.ending == "vocabulary"
    return (settings.discrete_full and cut) or ends


def sampling_params(rollout: RolloutConfig, kept_mass: bool = False) -> SamplingParams:
    """Settings of discrete positions and the length limit."""
    return SamplingParams(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_tokens=rollout.max_new_tokens,
        kept_mass=kept_mass,
    )


@dataclass(frozen=True)
class Sampling:
    """How prompts are sampled, but for the names of the samples: what engines are asked for, and
    seed and stream of the noise (`RolloutEngine.iter_groups`)."""

    params: SamplingParams
    soft: SoftParams | Literal[False]
    seed: int
    stream: int

    @classmethod
    def of_step(cls, config: Config, rollout: RolloutConfig) -> Sampling:
        """rollout: the settings of the step."""
        return cls(
            sampling_params(rollout, needs_kept_mass(config)),
            soft_params(rollout, config.algorithm.objective) or False,
            config.run.seed,
            ROLLOUT_STREAM,
        )

    @classmethod
    def of_evaluation(cls, config: Config, rollout: RolloutConfig) -> Sampling:
        """rollout: the settings of evaluations."""
        return cls(
            sampling_params(rollout),
            soft_params(rollout, config.algorithm.objective) or False,
            config.eval.seed,
            EVALUATION_STREAM,
        )


def rollout_uids(step: int, prompts: int, group_size: int) -> list[list[int]]:
    """Names of a step's samples: ((step * prompts + prompt) * group_size + sample) mod 2^32."""
    return [
        [((step * prompts + p) * group_size + s) % 2**32 for s in range(group_size)]
        for p in range(prompts)
    ]


def iter_samples(
    engine: RolloutEngine,
    prompts: Sequence[list[int]],
    uids: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    queue: Iterator[int],
    at_once: int,
    between_steps: Callable[[], None] = lambda: None,
) -> Generator[tuple[int, Output], None, None]:
    """Samples prompts once for each of their uids; yields (prompt index, Output) as they end.

    queue: indices of prompts, which other processes take as well, each when its engine has room.
    at_once: so many are in progress at most. Engines with room for everything then share it
    equally, whoever comes first. Raises ValueError for an engine that does not know the kept mass
    where it is asked for.
    """
    taken: list[int] = []
    ended = 0

    def groups() -> Iterator[tuple[list[int], Sequence[int]]]:
        while len(taken) - ended < at_once:
            index = next(queue, None)
            if index is None:
                return
            taken.append(index)
            yield prompts[index], uids[index]

    # An engine is done when it gets no more; when some have ended, there may be more again.
    while True:
        begun = len(taken)
        for place, output in engine.iter_groups(
            groups(),
            sampling.params,
            sampling.soft,
            seed=sampling.seed,
            stream=sampling.stream,
            between_steps=between_steps,
        ):
            ended += 1
            wanted = sampling.params.kept_mass
            if wanted and any(sample.kept_mass is None for sample in output.samples):
                raise ValueError(
                    f"rollout.engine: {type(engine).__name__} records no kept_mass, without which "
                    "the rollout's log p over the vocabulary is not known: set algorithm."
                    "discrete_logprob=candidates and an objective that scores candidates, or "
                    "another engine"
                )
            yield taken[begun + place], output
        if begun == len(taken):
            return


def collect(
    engine: RolloutEngine,
    prompts: Sequence[list[int]],
    uids: Sequence[Sequence[int]],
    sampling: Sampling,
) -> list[Output]:
    """Samples every prompt once for each of its uids; errors as `iter_samples`."""
    indices = range(len(prompts))
    samples = iter_samples(
        engine, prompts, uids, sampling, queue=iter(indices), at_once=len(prompts)
    )
    outputs = dict(samples)
    return [outputs[index] for index in indices]
