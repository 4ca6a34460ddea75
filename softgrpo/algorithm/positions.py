"""What each response position of a pass is, and which density it has: worked out on the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softgrpo_kernels.methods import METHODS
from softgrpo_kernels.methods.method import Method, NoisyMixtures, Rollout


@dataclass(frozen=True)
class DensitySettings:
    """How positions were sampled and how they are scored; the same on both sides by construction.

    tau, weight_floor, noise_scale: as in SoftParams. discrete_full: discrete positions are scored
    over the whole vocabulary instead of over their recorded candidates. discrete_listed: those
    candidates are on the record. max_soft_tokens: budget of the soft phase, None = unlimited.
    """

    method: Method = METHODS[0]
    tau: float = 0.1
    weight_floor: float = 0.0
    noise_scale: float = 1.0
    soft_temperature: float = 1.0
    discrete_temperature: float = 1.0
    discrete_full: bool = False
    discrete_listed: bool = True
    soft_enabled: bool = True
    max_soft_tokens: int | None = None

    @property
    def rollout(self) -> Rollout:
        """What a density reads of them."""
        return Rollout(self.noise_scale, self.tau, self.weight_floor)


@dataclass(frozen=True)
class ClassRows:
    """Indices of the positions of a class. Each int64 [N]. token: those that need the token's log
    p over the vocabulary."""

    soft: Tensor
    candidates: Tensor
    token: Tensor
    listed: Tensor


@dataclass(frozen=True)
class PositionClasses:
    """Every response position is in exactly one of the first four classes. All bool [T].

    soft: the density of the recorded g'. candidates: log q of the token over its recorded
    candidates. full: log-softmax of the token over the vocabulary. forced: no choice, no loss: put
    there by a budget, or a function of the policy.
    soft_phase: sampled with the soft parameters (soft positions and the token that ended them).
    listed: the candidates that it was drawn from are on the record. rows: the positions of some
    classes, int64: counted on the host, for a mask on a device would have to be waited for.
    """

    soft: Tensor
    candidates: Tensor
    full: Tensor
    forced: Tensor
    soft_phase: Tensor
    listed: Tensor
    rows: ClassRows


def classify(
    kind: Tensor, forced: Tensor, index: Tensor, settings: DensitySettings
) -> PositionClasses:
    """Sorts positions, on the host, into the classes of their density.

    kind: uint8 [T], 1 soft; forced: bool [T]; index: int64 [T], the place of each in its response,
    which are packed one behind the other.
    """
    kind = kind.bool()
    # A position is of the soft phase when the one before it was soft: the phase never comes back.
    after_soft = torch.ones_like(kind)
    after_soft[1:] = kind[:-1]
    after_soft[index == 0] = True
    soft_phase = after_soft & ~forced & settings.soft_enabled
    if settings.max_soft_tokens is not None:
        soft_phase &= index < settings.max_soft_tokens
    full = ~soft_phase & settings.discrete_full
    if settings.method.ending == "vocabulary":
        full |= soft_phase & ~kind
    if settings.method.ending == "none":
        forced = forced | (soft_phase & ~kind)
    full &= ~forced
    soft = kind | soft_phase if settings.method.ending == "density" else kind
    masks = {
        "soft": soft,
        "candidates": ~soft & ~full & ~forced,
        "full": full,
        "listed": ~forced & (soft_phase | settings.discrete_listed),
    }
    rows = ClassRows(
        soft=_rows(soft),
        candidates=_rows(masks["candidates"]),
        token=_rows(full | soft if settings.method.normalised_over == "vocabulary" else full),
        listed=_rows(masks["listed"]),
    )
    return PositionClasses(**masks, forced=forced, soft_phase=soft_phase, rows=rows)


def _rows(mask: Tensor) -> Tensor:
    return mask.nonzero()[:, 0]


@dataclass(frozen=True)
class Positions:
    """The T response positions of a pass, with all that their densities are computed from.

    ids, gprime: [T, K], kind, token: [T], the record (`softgrpo_engine.SoftTokens`). logprobs:
    float32 [T], the rollout's log p of the token. uid, position: int64 [T], counters of the noise.
    sample: int64 [T], the sample of each, of num_samples. seed, stream: the other keys of the
    noise. kept_mass: float32 [T], the probability over the vocabulary of the set that the token was
    drawn from; None: 1. mixtures: of the soft positions, where their noise is scored; set by the
    policy.
    """

    ids: Tensor
    gprime: Tensor
    kind: Tensor
    token: Tensor
    logprobs: Tensor
    uid: Tensor
    position: Tensor
    sample: Tensor
    classes: PositionClasses
    num_samples: int
    seed: int
    stream: int
    kept_mass: Tensor | None = None
    mixtures: NoisyMixtures | None = None

    @property
    def full_logprobs(self) -> Tensor:
        """The rollout's log p of the token over the vocabulary [T]; NaN at soft positions."""
        return self.logprobs if self.kept_mass is None else self.logprobs + self.kept_mass.log()
