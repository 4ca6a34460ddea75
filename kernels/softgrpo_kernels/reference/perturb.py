"""From log-probabilities of candidates to g': the noise of every method, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_kernels.methods import DRAWS
from softgrpo_kernels.methods.method import Noise
from softgrpo_kernels.noise import gumbel_noise
from softgrpo_kernels.row_parameters import RowParameters
from softgrpo_kernels.row_rules import SOFT


def perturb(logp: Tensor, ids: Tensor, used: Tensor, rows: RowParameters) -> Tensor:
    """g' of every slot; -inf where a slot is not (or no longer) used.

    Args:
        logp: [B, K], of the slots; ids: int [B, K]; used: bool [B, K].
    """
    keys = (rows.seed, rows.position, rows.uid, rows.stream)
    gprime = logp + gumbel_noise(ids, *keys).to(logp.dtype)  # of discrete rows
    for method in DRAWS:
        chosen = (rows.mode == SOFT) & (rows.noise == method.code)
        if bool(chosen.any()):
            seed, position, uid, stream = (key[chosen] for key in keys)
            noise = Noise(
                rows.noise_scale[chosen, None],
                rows.clamp_low[chosen, None],
                rows.clamp_high[chosen, None],
                (seed, position, uid, stream),
            )
            gprime[chosen] = method.perturb(logp[chosen], ids[chosen], used[chosen], noise)
    return gprime.masked_fill(~used, -torch.inf)
