"""Gumbel noise, scored as if its heaviest candidate had been drawn as a token."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_kernels.methods.gumbel import Gumbel
from softgrpo_kernels.methods.method import Rollout, live_slots


class Argmax(Gumbel):
    """Density: log q^(1/c) of the argmax of g', normalised over the live slots.

    The score of a discrete token: as quiet, and that of a mixture's reader only where the reader
    sees no more than the argmax (weight_floor 1). Of all other mixtures it is biased by Cov(reward,
    weights | argmax), at every size of the batch; `censored` is not.
    """

    objective = "argmax"

    def density(self, logq: Tensor, gprime: Tensor, rollout: Rollout) -> Tensor:
        logq, gprime, live = live_slots(logq, gprime)
        some = live.any(-1)
        # A row without live slots would have the gradient of a softmax over nothing.
        powers = torch.where(live | ~some[..., None], logq / rollout.noise_scale, -torch.inf)
        density = torch.where(some, powers.log_softmax(-1)[..., 0], 0.0)
        return torch.where(gprime.isnan().any(-1), torch.nan, density)
