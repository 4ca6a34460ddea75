"""The mean of independent draws (Multiplex Thinking, arXiv 2601.08808; CoT2, arXiv 2505.23648)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softgrpo_kernels.limits import MAX_CANDIDATES
from softgrpo_kernels.methods.method import Method, Noise
from softgrpo_kernels.noise import gumbel_noise


class Multiplex(Method):
    """g' = log(count / draws) of independent draws from p, `noise_scale` of them; the slots are the
    tokens drawn."""

    noise = "multiplex"
    code = 4
    why_untrained = (
        "its record holds the tokens drawn, not the set that they were drawn from, so their "
        "probability is not known; use gumbel"
    )
    draws_weights = True
    keeps_logp = False
    scale_rule = (
        f"noise_scale, the number of draws of multiplex noise, must be 1, 2 .. {MAX_CANDIDATES}"
    )

    @classmethod
    def refuses_scale(cls, scale: Any) -> Any:
        return ((scale >= 1.0) & (scale <= MAX_CANDIDATES) & (scale % 1.0 == 0.0)) ^ True

    def perturb(self, logp: Tensor, ids: Tensor, used: Tensor, noise: Noise) -> Tensor:
        count = torch.zeros_like(logp, dtype=torch.float64)
        draws = torch.where(used.any(-1), noise.scale[:, 0], 0.0)
        for draw in range(int(draws.max())):
            value = logp + gumbel_noise(ids, *noise.keys, draw).to(logp.dtype)
            value = value.masked_fill(~used, -torch.inf)
            tied = value == value.amax(-1, keepdim=True)
            lowest = torch.where(tied, ids, torch.iinfo(ids.dtype).max).argmin(-1, keepdim=True)
            count.scatter_add_(1, lowest, (draw < draws).to(count.dtype)[:, None])
        return torch.log(count / noise.scale).to(logp.dtype)
