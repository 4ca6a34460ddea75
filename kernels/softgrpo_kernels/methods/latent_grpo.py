"""Gumbel noise, with the surrogate of Latent-GRPO (arXiv 2604.27998, DJC-GO-SOLO/Latent-GRPO)."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_kernels.methods.gumbel import Gumbel
from softgrpo_kernels.methods.method import Rollout, live_slots


class LatentGrpo(Gumbel):
    """Mean over the recorded slots of -u_i - exp(-u_i), u_i = g'_i - log q_i, log q over the whole
    vocabulary. The noise is clipped to [-1.5, 3]; a noise scale is not divided out of u.

    Where the advantage is <= 0 and u_i < 0 the gradient is that of the mirrored u_i - exp(u_i),
    which has the same sign and is at most 1, as their code has it: exp(-u_i) has no bound.

    No density. Their code adds noise to log p over the vocabulary and selects candidates after it;
    here candidates are selected before it and log p is over them, so that u_i is their noise minus
    the log of the candidates' mass: take top_p 1 and many candidates. Their one-sided noise, an
    option, is not offered.
    """

    objective = "latent_grpo"
    normalised_over = "vocabulary"
    ending = "vocabulary"
    noise_clip = (-1.5, 3.0)

    def density(self, logq: Tensor, gprime: Tensor, rollout: Rollout) -> Tensor:
        logq, gprime, live = live_slots(logq, gprime)
        u = gprime - logq
        terms = -u - torch.exp(-u)
        if rollout.rewarded is not None:
            mirrored = ~rollout.rewarded[:, None] & (u < 0)
            # Only the gradient is the mirror's.
            mirror = torch.where(mirrored, u - torch.exp(u), 0.0)
            terms = torch.where(mirrored, terms.detach() + (mirror - mirror.detach()), terms)
        return torch.where(live, terms, 0.0).sum(-1) / live.sum(-1).clamp(min=1)

    def rollout_logp(self, gprime: Tensor, gumbel: Tensor, scale: float) -> Tensor:
        return gprime - scale * gumbel.clamp(*self.noise_clip)
