"""Logits from hidden states: z = softcap tanh(logit_scale (W x + bias) / softcap)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def scaled_and_capped(
    z: Tensor, logit_scale: float, softcap: float | None, out: Tensor | None = None
) -> Tensor:
    """softcap tanh(logit_scale z / softcap), what models do after lm_head; `out` may be z."""
    if logit_scale != 1.0:
        z = torch.mul(z, logit_scale, out=out)
    if softcap is None:
        return z
    z = torch.div(z, softcap, out=out)
    return torch.mul(torch.tanh(z, out=out), softcap, out=out)


class LMHead(NamedTuple):
    """Where the logits of a decode step come from.

    hidden: [B, H]; weight: [V, H] in the same dtype; bias: [V] or None; softcap: None = none.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    def logits(self) -> Tensor:
        """All logits [B, V] in the dtype of the hidden states."""
        z_BV = torch.nn.functional.linear(self.hidden, self.weight, self.bias)
        return scaled_and_capped(z_BV, self.logit_scale, self.softcap)

    def logits_of(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Logits of tokens [B, K], multiplied and added in this dtype."""
        z_BK = (self.hidden[:, None].to(dtype) * self.weight[ids].to(dtype)).sum(-1)
        z_BK = z_BK if self.bias is None else z_BK + self.bias[ids].to(dtype)
        return scaled_and_capped(z_BK, self.logit_scale, self.softcap)
