"""What a soft-thinking method is."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from softgrpo_kernels.noise import gumbel_noise

Keys = tuple[Tensor, Tensor, Tensor, Tensor]


class Noise(NamedTuple):
    """How the noise of some rows is drawn.

    scale, clamp_low, clamp_high: float [B, 1]. keys: seed, position, uid, stream, int64 [B] each.
    drawn: bool [B, K], the token that a discrete row would draw.
    """

    scale: Tensor
    clamp_low: Tensor
    clamp_high: Tensor
    keys: Keys
    drawn: Tensor


class NoisyMixtures(NamedTuple):
    """Mixtures of embeddings with noise: sum_i w_i table[ids_i] + deviation * noise.

    ids: int [N, K]. noise: float32 [N, H], standard normal. deviation: float32, a number. table:
    [V, H], detached.
    """

    ids: Tensor
    noise: Tensor
    deviation: Tensor
    table: Tensor


class Rollout(NamedTuple):
    """What a density reads of the rollout: the settings that it was drawn with, as `soft_token` has
    them; which of the rows earned an advantage above 0, bool [N], None: nobody asks; and the
    mixtures of methods that add noise to them."""

    noise_scale: float = 1.0
    tau: float = 0.1
    weight_floor: float = 0.0
    rewarded: Tensor | None = None
    mixtures: NoisyMixtures | None = None


class Method:
    """One way of soft thinking: how a position is drawn, what is fed, and how it is scored.

    A method is a subclass in a file of its own and an entry of `methods.METHODS`; the kernels, the
    engine, the configuration and the trainer ask it for all that differs between methods. What it
    records is the same for all: ids and g' of the candidates, best first, of which the weights are
    softmax(g' / tau) where they are above the floor. A candidate with g' = -inf has weight 0 and
    still belongs to the set that q runs over; an unused slot has id -1.

    Attributes:
        noise: name of its noise: `noise` of `soft_token`, `rollout.soft.noise`.
        code: number of that noise in the tables of the rows, the same in C++ and Triton.
        objective: name of its density: `algorithm.objective`. None: it has none.
        why_untrained: why it has none, and what to take instead.
        needs_floor: its density is that of a mixture with a weight floor.
        adds_noise: noise is added to the mixture (`embedding_noise`), of which its density is
            (`Rollout.mixtures`).
        why_no_floor: why its weights have no floor; empty where they may have one.
        draws_token: the token is drawn from p itself and stands in slot 0; the other candidates
            follow, best g' first. Slot 0 need not be the heaviest.
        draws_weights: g' is the logarithm of a weight that was drawn itself: it goes with tau 1.
        keeps_logp: log p of the candidates comes back from the record (`rollout_logp`).
        normalised_over: the set over which the log q of its density is normalised: the recorded
            "candidates", or the whole "vocabulary".
        ending: how the token that ends a soft phase is scored: over its recorded "candidates", over
            the whole "vocabulary", by the "density" of its g', of which it is a function, or not at
            all, for it is a function of the policy: "none".
        per_slot: each drawn slot has a ratio of its own (`slot_terms`).
        noise_clip, eps: settings of `soft_token` that belong to its density.
    """

    noise: ClassVar[str]
    code: ClassVar[int]
    objective: ClassVar[str | None] = None
    why_untrained: ClassVar[str] = ""
    needs_floor: ClassVar[bool] = False
    adds_noise: ClassVar[bool] = False
    why_no_floor: ClassVar[str] = ""
    draws_token: ClassVar[bool] = False
    draws_weights: ClassVar[bool] = False
    keeps_logp: ClassVar[bool] = True
    normalised_over: ClassVar[Literal["candidates", "vocabulary"]] = "candidates"
    ending: ClassVar[Literal["candidates", "vocabulary", "density", "none"]] = "candidates"
    per_slot: ClassVar[bool] = False
    noise_clip: ClassVar[tuple[float, float] | None] = None
    eps: ClassVar[float] = 0.0
    scale_rule: ClassVar[str] = "noise_scale must be >= 0 and finite"

    @property
    def records_density(self) -> bool:
        """Whether the rollout's own density follows from the record."""
        return self.keeps_logp and self.normalised_over == "candidates"

    @property
    def heavy_tailed(self) -> bool:
        """Whether the ratio of two of its densities has a variance that is infinite once a
        candidate's probability has halved (or, of normal noise, exponential in their distance):
        the densities of continuous noise itself. What the others score bounds the ratio."""
        return self.objective == "exact" and not self.draws_token

    @classmethod
    def refuses_scale(cls, scale: Any) -> Any:
        """Whether a noise_scale, >= 0 and finite, is not allowed (`scale_rule` says what is); of a
        number or of each number of a tensor."""
        return scale < 0.0

    def perturb(self, logp: Tensor, ids: Tensor, used: Tensor, noise: Noise) -> Tensor:
        """g' of every slot in plain PyTorch: the meaning of the C++ and Triton code.

        logp, ids, used: [B, K], of the candidates, the most probable first; a slot that is not used
        holds anything, in the result too.
        """
        raise NotImplementedError

    def density(self, logq: Tensor, gprime: Tensor, rollout: Rollout) -> Tensor:
        """Log-density [N] of recorded g' under the current log q, differentiable in log q.

        logq, gprime: [N, K], dead slots -inf in g'; 0 where no slot is live, NaN where a live slot
        holds a NaN.
        """
        raise NotImplementedError

    def slot_terms(self, logq: Tensor, gprime: Tensor, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """(terms [N, K], counts [N, K]) with density = sum(counts * terms): what has a ratio of its
        own, and how often it counts; [N, 1] where `per_slot` is false.

        Arguments as in `density`. A slot that counts 0 times has a finite term all the same.
        """
        terms = self.density(logq, gprime, rollout)[:, None]
        return terms, torch.ones_like(terms)

    def ending_scale(self, noise_scale: float) -> float:
        """c of p^(1/c), from which the token of a position is drawn; where `ending` is
        "candidates"."""
        return 1.0

    def rollout_logp(self, gprime: Tensor, gumbel: Tensor, scale: float) -> Tensor:
        """log p that the rollout drew from [N, K], recovered from g' and the standard Gumbel noise
        of its candidates; to a rounding of the larger of the two."""
        return gprime - scale * gumbel


def live_slots(logq: Tensor, gprime: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log q, g', which slots are live), both 0 in dead slots and in log q's dtype.

    Dead slots leave before any arithmetic: -inf - -inf would put NaN into the gradient.
    """
    live = gprime != -torch.inf  # NaN is live: it must not vanish
    logq = torch.where(live, logq, 0.0)
    return logq, torch.where(live, gprime, 0.0).to(logq.dtype), live


def drawn_candidate(logp: Tensor, ids: Tensor, used: Tensor, keys: Keys, draw: int = 0) -> Tensor:
    """bool [B, K]: the used slot that wins a draw from p, by Gumbel-max; the lowest id of equals.
    Draw 0 is that of a discrete row."""
    value = (logp + gumbel_noise(ids, *keys, draw).to(logp.dtype)).masked_fill(~used, -torch.inf)
    tied = used & (value == value.amax(-1, keepdim=True))
    first = torch.where(tied, ids, torch.iinfo(ids.dtype).max).argmin(-1, keepdim=True)
    return tied & (torch.arange(ids.shape[1], device=ids.device) == first)
