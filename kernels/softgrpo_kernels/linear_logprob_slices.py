"""What the passes over the vocabulary share on all back ends: its slices, and the map of logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from softgrpo_kernels.lm_head import scaled_and_capped

# Elements of the largest temporary (fp32: 64 MiB).
_CHUNK_ELEMENTS = 1 << 24


class LogitMap(NamedTuple):
    """a = softcap tanh(logit_scale (dot + bias) / softcap) / T, what models do after lm_head.

    bias: [V] or None. temperature: [N, 1] in the dtype of the computation. softcap: None = none.
    """

    bias: Tensor | None
    temperature: Tensor
    softcap: float | None
    logit_scale: float

    def apply_(self, dots_NC: Tensor, tokens: slice) -> Tensor:
        """From dot products with the rows `tokens` of lm_head to a, in place."""
        if self.bias is not None:
            dots_NC += self.bias[tokens]
        scaled_and_capped(dots_NC, self.logit_scale, self.softcap, out=dots_NC)
        return dots_NC.div_(self.temperature)

    def slope(self, a_NC: Tensor) -> Tensor:
        """da / d(dot or bias) [N, C], or [N, 1] where it is the same for all tokens."""
        slope = self.logit_scale / self.temperature
        if self.softcap is None:
            return slope
        return slope * (1.0 - (a_NC * (self.temperature / self.softcap)).square())


class TokenGradients(NamedTuple):
    """Gradients of the three results of `token_logprob`, each [N]; entropy's None: not needed."""

    logp: Tensor
    lse: Tensor
    entropy: Tensor | None


def vocabulary_slices(
    lm_head: Tensor, rows: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """(tokens, their weights [C, H]) over the vocabulary; each slice is converted once."""
    step = max(256, _CHUNK_ELEMENTS // max(1, rows, lm_head.shape[1]))
    for begin in range(0, lm_head.shape[0], step):
        tokens = slice(begin, min(begin + step, lm_head.shape[0]))
        yield tokens, lm_head[tokens].to(dtype)
