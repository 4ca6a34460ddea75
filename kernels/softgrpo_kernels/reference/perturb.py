"""From log-probabilities of candidates to g': the noise of every method, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_kernels.methods import DRAWS
from softgrpo_kernels.methods.method import Noise, drawn_candidate
from softgrpo_kernels.noise import gumbel_noise
from softgrpo_kernels.row_parameters import RowParameters
from softgrpo_kernels.row_rules import SOFT


def perturb(logp: Tensor, ids: Tensor, used: Tensor, rows: RowParameters) -> tuple[Tensor, Tensor]:
    """g' of every slot, -inf where it is not used, and which comes first whatever its g': the token
    of methods that draw it.

    Args:
        logp: [B, K], of the slots; ids: int [B, K]; used: bool [B, K].
    """
    keys = (rows.seed, rows.position, rows.uid, rows.stream)
    gprime = logp + gumbel_noise(ids, *keys).to(logp.dtype)  # of discrete rows
    drawn = drawn_candidate(logp, ids, used, keys)
    first = torch.zeros_like(used)
    for method in DRAWS:
        chosen = (rows.mode == SOFT) & (rows.noise == method.code)
        if bool(chosen.any()):
            seed, position, uid, stream = (key[chosen] for key in keys)
            noise = Noise(
                rows.noise_scale[chosen, None],
                rows.clamp_low[chosen, None],
                rows.clamp_high[chosen, None],
                (seed, position, uid, stream),
                drawn[chosen],
            )
            gprime[chosen] = method.perturb(logp[chosen], ids[chosen], used[chosen], noise)
            if method.draws_token:
                first[chosen] = drawn[chosen]
    return gprime.masked_fill(~used, -torch.inf), first
