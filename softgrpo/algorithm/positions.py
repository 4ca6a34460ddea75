"""What each response position of a pass is, and which density it has: worked out on the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softgrpo.rollout.batch import RolloutBatch
from softgrpo_engine import SoftTokens


@dataclass(frozen=True)
class DensitySettings:
    """How positions were sampled and how they are scored; the same on both sides by construction.

    noise: gumbel, dirichlet or gaussian; noise_scale as in SoftParams. discrete_full: discrete
    positions are scored over the whole vocabulary instead of over their recorded candidates.
    discrete_listed: those candidates are on the record. max_soft_tokens: budget of the soft phase,
    None = unlimited.
    """

    objective: str = "exact"
    tau: float = 0.1
    noise: str = "gumbel"
    noise_scale: float = 1.0
    soft_temperature: float = 1.0
    discrete_temperature: float = 1.0
    discrete_full: bool = False
    discrete_listed: bool = True
    soft_enabled: bool = True
    max_soft_tokens: int | None = None

    @property
    def official(self) -> bool:
        return self.objective == "official"


@dataclass(frozen=True)
class ClassRows:
    """Indices of the positions of a class. Each int64 [N]."""

    soft: Tensor
    candidates: Tensor
    full: Tensor
    listed: Tensor


@dataclass(frozen=True)
class PositionClasses:
    """Every response position is in exactly one of the first four classes. All bool [T].

    soft: the density of the recorded g'. candidates: log q of the token over its recorded
    candidates. full: log-softmax of the token over the vocabulary. forced: no choice, no loss.
    soft_phase: sampled with the soft parameters (soft positions and the token that ended them).
    listed: the candidates that it was drawn from are on the record. rows: the positions of some of
    these, by name, int64: counted on the host, for a mask on a device would have to be waited for.
    """

    soft: Tensor
    candidates: Tensor
    full: Tensor
    forced: Tensor
    soft_phase: Tensor
    listed: Tensor
    rows: ClassRows


def classify(batch: RolloutBatch, settings: DensitySettings) -> PositionClasses:
    """Sorts the positions of a batch, on the host, into the classes of their density."""
    kind, forced = batch.soft.kind.bool(), batch.soft.forced.bool()
    index = batch.index_in_response
    # A position is of the soft phase when the one before it was soft: the phase never comes back.
    after_soft = torch.ones_like(kind)
    after_soft[1:] = kind[:-1]
    after_soft[index == 0] = True
    soft_phase = after_soft & ~forced & settings.soft_enabled
    if settings.max_soft_tokens is not None:
        soft_phase &= index < settings.max_soft_tokens
    full = ~soft_phase & settings.discrete_full
    if settings.official:
        full |= soft_phase & ~kind
    full &= ~forced
    # Only of Gumbel noise is the chance of the argmax known: the token that ended a soft phase of
    # another noise is scored by the density of its g', of which it is a function.
    soft = kind if settings.noise == "gumbel" else kind | soft_phase
    masks = {
        "soft": soft,
        "candidates": ~soft & ~full & ~forced,
        "full": full,
        "listed": ~forced & (soft_phase | settings.discrete_listed),
    }
    rows = ClassRows(**{name: mask.nonzero()[:, 0] for name, mask in masks.items()})
    return PositionClasses(**masks, forced=forced, soft_phase=soft_phase, rows=rows)


@dataclass(frozen=True)
class Positions:
    """The T response positions of a pass, with all that their densities are computed from.

    soft: SoftTokens [T, K]. logprobs: float32 [T], the rollout's log p of the token. uid, position:
    int64 [T], counters of the noise. sample: int64 [T], the sample of each, of num_samples. seed,
    stream: the other keys of the noise.
    """

    soft: SoftTokens
    logprobs: Tensor
    uid: Tensor
    position: Tensor
    sample: Tensor
    classes: PositionClasses
    num_samples: int
    seed: int
    stream: int

    @staticmethod
    def of(batch: RolloutBatch, settings: DensitySettings) -> Positions:
        """Those of a batch, on the host as it is."""
        sample = batch.sample_of_token
        return Positions(
            soft=batch.soft,
            logprobs=batch.logprobs,
            uid=batch.uid[sample],
            position=batch.position,
            sample=sample,
            classes=classify(batch, settings),
            num_samples=len(batch.group),
            seed=batch.seed,
            stream=batch.stream,
        )
