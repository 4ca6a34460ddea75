"""What models do with logits after the LM head, as a device function."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scaled_and_capped(z, logit_scale, softcap, SOFTCAP: tl.constexpr):
    """softcap tanh(logit_scale z / softcap), or logit_scale z."""
    z = z * logit_scale
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        z = softcap * (1.0 - 2.0 / (tl.exp(2.0 * z / softcap) + 1.0))
    return z
