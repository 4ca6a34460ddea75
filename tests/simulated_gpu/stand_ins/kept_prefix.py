"""Which prefix of a row `gpu.soft_token.full_vocabulary.cut_kernel` keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_kernels.row_parameters import RowParameters

from .keys import LAST_ID, LOWEST, key_of, number_of, order_of, token_of


def unit_of(total: Tensor) -> Tensor:
    """The power of two, fp32, with which a row's whole mass is just below 2^62."""
    exponent = (total.view(torch.int64) >> 52) - 1023
    return ((61 - exponent + 127) << 23).int().view(torch.float32)


def mass_of(a: Tensor, top: Tensor, unit: Tensor) -> Tensor:
    return (torch.exp(a - top[:, None]) * unit[:, None]).long()


def kept_prefix(
    a: Tensor, ids: Tensor, rows: RowParameters, top_k: Tensor, top: Tensor, total: Tensor,
    joint: bool, vocabulary: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(lowest key, last id of those that tie with it, log of the mass) of what is kept. By sorting
    where the kernel bisects: the numbers that both compare are the same."""
    keys = key_of(a, ids).sort(descending=True).values
    order, sorted_ids = keys >> 32, token_of(keys)

    unit = unit_of(total)
    each, highest = mass_of(number_of(order.int()), top, unit), order_of(top).long()

    def above(key: Tensor) -> tuple[Tensor, Tensor]:
        larger = order > key[:, None]
        return larger.sum(-1), torch.where(larger, each, 0).sum(-1)

    def mass_at(key: Tensor) -> Tensor:
        return mass_of(number_of(key.int())[:, None], top, unit)[:, 0]

    key, free = torch.full_like(top_k, LOWEST), torch.zeros_like(top_k)
    number, mass = above(key)
    cuts = (top_k > 0) & (number > top_k)
    kth = order.gather(1, (top_k - 1).clamp(0, order.shape[1] - 1)[:, None])[:, 0]
    key = torch.where(cuts, kth, key)
    number, mass = above(key)
    free = torch.where(cuts, top_k - number, free)
    if not joint:
        within = (mass + free * mass_at(key)).double() / unit.double()
        total = torch.where(top_k > 0, within, total)

    # top-p: the lowest key whose first token has less than top_p before it.
    limit = rows.top_p.double() * total * unit.double()
    before = each.cumsum(-1) - each
    before = before.gather(1, torch.searchsorted(-order, -order))  # of the first of those that tie
    inside = (before.double() < limit[:, None]) & (order > key[:, None])
    lowest = torch.where(inside, order, highest[:, None]).amin(-1)
    lowest = torch.where(mass.double() < limit, key, lowest)
    number, mass = above(lowest)
    fits = (limit - mass.double()) / mass_at(lowest).clamp(min=1).double()
    fits = torch.ceil(fits).long().clamp(min=1)
    nucleus = rows.top_p < 1
    free = torch.where(nucleus & ((lowest > key) | (fits < free)), fits, free)
    key = torch.where(nucleus, lowest, key)

    exact = top.double() + torch.log(rows.min_p.double())
    near = exact.float()
    least = order_of(near).long() + (near.double() < exact)
    by_min_p = rows.min_p > 0
    free = torch.where(by_min_p & (least > key), LAST_ID, free)
    key = torch.where(by_min_p, torch.maximum(key, least), key)

    number, mass = above(key)
    tied = ((order == key[:, None]) & (sorted_ids < LAST_ID)).sum(-1)
    # Among those that tie ids ascend: the last one kept follows the larger keys at once.
    at = (number + free - 1).clamp(0, order.shape[1] - 1)[:, None]
    last = torch.where(free < tied, sorted_ids.gather(1, at)[:, 0], vocabulary - 1)
    mass = mass + torch.minimum(free, tied) * mass_at(key)
    return key, torch.where(free > 0, last, -1), torch.log(mass.double() / unit.double())
