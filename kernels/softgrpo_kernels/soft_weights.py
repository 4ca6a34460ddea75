"""Mixture weights from the record."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_kernels.checks import check_divisor, check_number_per_row


def soft_weights(gprime: Tensor, kind: Tensor, tau: float | Tensor) -> Tensor:
    """Weights of the mixture, the one function that engine and trainer share.

    Args:
        gprime: [..., K], perturbed log-probabilities, best first; unused slots -inf.
        kind: uint8 [...], 1 soft, 0 discrete.
        tau: Gumbel-Softmax temperature, a number or [...].

    Returns:
        [..., K] in gprime's dtype: softmax(g'/tau) where kind is 1, one-hot on slot 0 where it is
        0, all zero where slot 0 is unused.

    Raises:
        ValueError: shapes that do not fit; a number tau that is not > 0.
    """
    rows = gprime.shape[:-1]
    if gprime.dim() == 0 or gprime.shape[-1] == 0 or kind.shape != rows:
        raise ValueError(
            f"need gprime [..., K] with K > 0 and kind [...], got {list(gprime.shape)} and "
            f"{list(kind.shape)}"
        )
    if isinstance(tau, Tensor):
        check_number_per_row("tau", tau, rows)
        tau = tau.to(gprime.dtype).unsqueeze(-1)
    else:
        check_divisor("tau", tau)
    # g'/tau rounds to fp32; exp and sum run in fp64, so that after the final rounding neither the
    # order of the sum nor the width K nor the library's exp shows.
    weights = torch.softmax((gprime / tau).double(), dim=-1)
    one_hot = torch.zeros_like(weights)
    one_hot[..., 0] = 1.0
    weights = torch.where((kind != 0).unsqueeze(-1), weights, one_hot)
    empty = gprime[..., :1] == -torch.inf
    return weights.masked_fill(empty, 0.0).to(gprime.dtype)
