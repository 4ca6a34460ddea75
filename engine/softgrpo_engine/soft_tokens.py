"""The record of generated positions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SoftTokens:
    """Generated positions, packed [T, K] or one step [B, K].

    ids: int32 [.., K], candidates, best g' first (behind the
    token, where the method draws it); unused slots -1. gprime: float32 [.., K],
    perturbed log-probabilities log p + noise; unused slots -inf. kind: uint8 [..], 0 discrete,
    1 soft. forced: bool [..], put there by a budget and not chosen. token: int32 [..], what the
    text shows (``ids[.., 0]``).

    Weights are never stored: ``soft_weights(gprime, kind, tau)`` gives them back.
    """

    ids: Tensor
    gprime: Tensor
    kind: Tensor
    forced: Tensor
    token: Tensor
