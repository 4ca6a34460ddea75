"""Gaussian noise on the mixture of embeddings (Soft Tokens, arXiv 2509.19170)."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_kernels.methods.method import Rollout, live_slots
from softgrpo_kernels.methods.plain import Plain
from softgrpo_kernels.soft_embedding import soft_embedding


class EmbeddingNoise(Plain):
    """The input is h(p) + sigma eps: h(p) = sum_i w_i E_i of the weights w = softmax(log p / tau),
    with tau 1 p itself; eps ~ N(0, I_H), a function of the noise keys (`embedding_noise`); sigma
    the noise scale times the root mean square of all numbers in the table E.

    Density of the input under the current q, over that under the rollout's own p:
    -(|v|^2 - |eps|^2) / 2, v = eps - u, u = (h(q) - h(p)) / sigma. That is <eps, u> - |u|^2 / 2,
    which loses nothing to |eps|^2 of about H: 0 on the policy that sampled. E is a constant.

    The token is the argmax of p. That it ends thinking is no choice, and has no score.
    """

    noise = "embedding"
    objective = "exact"
    why_untrained = ""
    adds_noise = True
    why_no_floor = "its mixture is a smooth function of the policy"
    ending = "none"

    def density(self, logq: Tensor, gprime: Tensor, rollout: Rollout) -> Tensor:
        mixtures = rollout.mixtures
        assert mixtures is not None
        logq, logp, live = live_slots(logq, gprime)
        # A row without live slots would have the gradient of a softmax over nothing.
        dead = ~live & live.any(-1, keepdim=True)
        q, p = ((x / rollout.tau).masked_fill(dead, -torch.inf).softmax(-1) for x in (logq, logp))
        moved = soft_embedding(mixtures.ids, q - p, mixtures.table) / mixtures.deviation
        return (moved * (mixtures.noise - 0.5 * moved)).sum(-1).to(logq.dtype)
