"""The mean of independent draws (Multiplex Thinking, arXiv 2601.08808; CoT2, arXiv 2505.23648)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softgrpo_kernels.limits import MAX_CANDIDATES
from softgrpo_kernels.methods.method import Method, Noise, Rollout, drawn_candidate
from softgrpo_kernels.noise import portable_log


class Multiplex(Method):
    """g' = log(count / K) of K independent draws from p, K the noise scale; the first draw is the
    token. Candidates that were not drawn have g' = -inf.

    Density: sum_i count_i log q_i, the probability of the K draws in their order: one ratio of all.
    """

    noise = "multiplex"
    code = 4
    objective = "exact"
    draws_token = True
    why_no_floor = "the token that it draws need not be the heaviest"
    draws_weights = True
    keeps_logp = False
    scale_rule = (
        f"noise_scale, the number of draws of multiplex noise, must be 1, 2 .. {MAX_CANDIDATES}"
    )

    @classmethod
    def refuses_scale(cls, scale: Any) -> Any:
        return ((scale >= 1.0) & (scale <= MAX_CANDIDATES) & (scale % 1.0 == 0.0)) ^ True

    def perturb(self, logp: Tensor, ids: Tensor, used: Tensor, noise: Noise) -> Tensor:
        count = torch.zeros_like(logp, dtype=torch.float32)
        draws = noise.scale.masked_fill(~used.any(-1, keepdim=True), 0.0)  # a bad row's may be any
        for draw in range(int(draws.max())):
            count += drawn_candidate(logp, ids, used, noise.keys, draw) & (draw < draws)
        gprime = self.log_weights(count.clamp(min=1), logp.float(), draws.float())
        return gprime.masked_fill(count == 0, -torch.inf).to(logp.dtype)

    def log_weights(self, count: Tensor, logp: Tensor, draws: Tensor) -> Tensor:
        """g' of candidates that were drawn so often; all fp32, the same bits in every back end."""
        return portable_log(count / draws)

    def counts(self, gprime: Tensor, draws: float) -> Tensor:
        """How often each candidate was drawn [N, K], read from the record: 0, 1 .. draws."""
        return (gprime.exp() * draws).round()

    def density(self, logq: Tensor, gprime: Tensor, rollout: Rollout) -> Tensor:
        terms, counts = self._terms(logq, gprime, rollout)
        return (counts * terms).sum(-1)

    def _terms(self, logq: Tensor, gprime: Tensor, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """(log q, count) of every candidate, both 0 where it was not drawn."""
        counts = self.counts(gprime, rollout.noise_scale).to(logq.dtype)
        return torch.where(gprime != -torch.inf, logq, 0.0), counts


class SlotMean(Multiplex):
    """Density: (1/K) sum_i count_i log q_i, the ratio of CoT2: the geometric mean of the draws'."""

    objective = "slot_mean"

    def density(self, logq: Tensor, gprime: Tensor, rollout: Rollout) -> Tensor:
        return super().density(logq, gprime, rollout) / rollout.noise_scale


class PerSlot(Multiplex):
    """The density of `exact`; ratio and clip are of every draw, summed (Multiplex Thinking)."""

    objective = "per_slot"
    per_slot = True

    def slot_terms(self, logq: Tensor, gprime: Tensor, rollout: Rollout) -> tuple[Tensor, Tensor]:
        return self._terms(logq, gprime, rollout)
