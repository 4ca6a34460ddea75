"""Mixture weights from the record."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softgrpo_kernels.checks import check_divisor, check_number_per_row


def soft_weights(
    gprime: Tensor, kind: Tensor, tau: float | Tensor, weight_floor: float | Tensor = 0.0
) -> Tensor:
    """Weights of the mixture, the one function that engine and trainer share.

    Args:
        gprime: [..., K], perturbed log-probabilities, unused slots -inf; best first, or the drawn
            token before the others (methods with `draws_token`).
        kind: uint8 [...], 1 soft, 0 discrete.
        tau: Gumbel-Softmax temperature, a number or [...].
        weight_floor: 0 .. 1, a number or [...]: a weight below so much of slot 0's is 0; 0 for
            methods with `draws_token`, whose slot 0 need not be the largest.

    Returns:
        [..., K] in gprime's dtype: softmax(g'/tau) where kind is 1, over the slots that the floor
        leaves; one-hot on slot 0 where it is 0, all zero where slot 0 is unused.

    Raises:
        ValueError: shapes that do not fit; a number tau that is not > 0, or a floor out of range.
    """
    return weights_within(gprime, kind, tau, weight_reach(tau, weight_floor))


def weight_reach(tau: float | Tensor, weight_floor: float | Tensor) -> float | Tensor:
    """How far below the best g' a slot still counts, fp32: tau ln(1 / weight_floor).

    It is this number that every back end compares with g'_0 - g'_i, exactly: the same slots count
    in all of them. Infinite without a floor.
    """
    if not isinstance(weight_floor, Tensor):
        if not 0.0 <= weight_floor <= 1.0:
            raise ValueError(f"weight_floor must be in 0 .. 1, not {weight_floor}")
        if weight_floor == 0.0:
            return math.inf
        fall = -math.log(weight_floor)
        if not isinstance(tau, Tensor):
            return torch.tensor(tau * fall, dtype=torch.float32).item()
        return (tau.double() * fall).float()
    return (-weight_floor.double().log() * tau).float()


def counted_slots(gprime: Tensor, reach: float | Tensor) -> Tensor:
    """bool [..., K]: slots whose g' is not more than `reach`, a number or [...], below that of
    slot 0; a NaN is not, so that it shows in what follows."""
    reach = reach.unsqueeze(-1) if isinstance(reach, Tensor) and reach.dim() else reach
    # Exact: fp64 holds the difference of two fp32 numbers of this size.
    return ~(gprime[..., :1].double() - gprime.double() > reach)


def weights_within(
    gprime: Tensor, kind: Tensor, tau: float | Tensor, reach: float | Tensor
) -> Tensor:
    """`soft_weights` by what follows from its floor, as the tables of the rows hold it."""
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
        # As a tensor: by a number CUDA divides as it multiplies by the reciprocal.
        tau = torch.full((), tau, dtype=gprime.dtype, device=gprime.device)
    # g'/tau rounds to fp32; exp and sum run in fp64, so that after the final rounding neither the
    # order of the sum nor the width K nor the library's exp shows.
    powers = torch.where(counted_slots(gprime, reach), (gprime / tau).double(), -torch.inf)
    weights = torch.softmax(powers, dim=-1)
    one_hot = torch.zeros_like(weights)
    one_hot[..., 0] = 1.0
    weights = torch.where((kind != 0).unsqueeze(-1), weights, one_hot)
    empty = gprime[..., :1] == -torch.inf
    return weights.masked_fill(empty, 0.0).to(gprime.dtype)
