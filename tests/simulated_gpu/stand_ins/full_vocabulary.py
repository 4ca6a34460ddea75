"""Stand-in for the kernel of `softgrpo_kernels.gpu.soft_token.full_vocabulary`, and what another
draws from what it leaves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from softgrpo_kernels.gpu.soft_token import full_vocabulary as kernels
from softgrpo_kernels.gpu.soft_token.statistics import BINS, BINS_PER_NAT, CHUNK
from softgrpo_kernels.row_parameters import RowParameters

from .draw import sound
from .gumbel_noise import gumbel_noise
from .kept_prefix import kept_prefix, mass_of, unit_of
from .keys import LAST_ID, LOWEST, NOTHING, key_of, order_of, token_of
from .memory import first, parameters_at, rows_of

Grid = tuple[int, ...]


def _of(rows: RowParameters, index: Tensor) -> RowParameters:
    return RowParameters(rows.floats[:, index], rows.ints[:, index], rows.k_max)


def _keys_of(a: Tensor, ids: Tensor, rows: RowParameters) -> Tensor:
    """In the order of a + noise."""
    noise = gumbel_noise(ids, rows.seed, rows.position, rows.uid, rows.stream)
    return key_of(a + noise, ids)


def _limits(rows: RowParameters, vocabulary: int) -> tuple[Tensor, Tensor]:
    """top_k (0 for none), and whether anything cuts the row."""
    top_k = torch.where((rows.top_k > 0) & (rows.top_k < vocabulary), rows.top_k, 0)
    return top_k, (rows.top_p < 1) | (rows.min_p > 0) | (top_k > 0)


def _row_statistics(chunk: Tensor, chunks: int, batch: int, row: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum fp32 and sum exp(a - maximum) fp64."""
    sums = first(chunk, batch * chunks * 4).view(batch, chunks, 4)[row]
    m, s = sums[..., 0], sums[..., 1]
    top = m.amax(-1)
    return top, (s.double() * torch.exp(m - top[:, None]).double()).sum(-1)


def collect_kernel(
    grid: Grid,
    best: Tensor,
    listed_a: Tensor,
    listed_id: Tensor,
    count: Tensor,
    histogram: Tensor,
    chunk_sums: Tensor,
    logits: Tensor,
    stride: int,
    vocabulary: int,
    chunks: int,
    floats: Tensor,
    ints: Tensor,
    columns: int,
    k_max: int,
    at_row: Tensor | None,
    at_step: Tensor | None,
    phases: Tensor | None,
    PADDED: int,
) -> None:
    batch = grid[0] // chunks
    assert grid == (batch * chunks,)
    assert (chunks - 1) * CHUNK < vocabulary <= chunks * CHUNK
    assert chunks <= PADDED
    of_batch = parameters_at(batch, floats, ints, columns, k_max, at_row, at_step, phases)
    index = (of_batch.unlisted & sound(of_batch)).nonzero()[:, 0]
    rows = _of(of_batch, index)
    top_k, cuts = _limits(rows, vocabulary)
    a_RV = rows_of(logits, batch, stride, vocabulary)[index].float() / rows.temperature[:, None]
    if not bool(cuts.all()):
        whole = ~cuts
        ids, a = torch.arange(vocabulary), a_RV[whole]
        keys = _keys_of(a, ids.expand(len(a), -1), _of(rows, whole))
        keys = keys.masked_fill_(order_of(a) <= LOWEST, NOTHING)
        keys = F.pad(keys, (0, chunks * CHUNK - vocabulary), value=NOTHING)
        rows_of(best, batch, chunks, chunks)[index[whole]] = keys.view(len(a), chunks, -1).amax(-1)
    chosen = cuts & (top_k == 0)
    if not bool(chosen.any()):
        return
    index, rows, a_RV = index[chosen], _of(rows, chosen), a_RV[chosen]
    top, total = _row_statistics(chunk_sums, chunks, batch, index)
    rare = torch.where(rows.top_p < 1, (1 - rows.top_p) * total.float() / vocabulary, 0.0)
    bound = (top + torch.log(torch.maximum(rare, rows.min_p)) - 1e-3)[:, None]
    found = (a_RV >= bound) & (a_RV > -torch.inf) & (top < torch.inf)[:, None]
    capacity = kernels.CAPACITY.value
    number = first(count, batch)
    place = number[index, None] + found.cumsum(-1) - 1
    number[index] += found.sum(-1).int()
    bins = ((top[:, None] - a_RV) * BINS_PER_NAT.value).clamp(max=BINS.value - 1)
    mass = torch.where(found, mass_of(a_RV, top, unit_of(total)), 0)
    masses = rows_of(histogram, batch, BINS.value, BINS.value)
    masses[index] = masses[index].scatter_add(1, torch.where(found, bins, 0.0).long(), mass)
    r, i = (found & (place < capacity)).nonzero().unbind(-1)
    at = index[r], place[r, i]
    rows_of(listed_a, batch, capacity, capacity)[at] = a_RV[r, i]
    rows_of(listed_id, batch, capacity, capacity)[at] = i.int()


def _source(
    index: Tensor, rows: RowParameters, batch: int, logits: Tensor, stride: int, vocabulary: int,
    listed_a: Tensor, listed_id: Tensor, count: Tensor, listable: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """a and ids [R, S]: the list where the row may have one and it holds all, or the row itself;
    -inf and the largest id past the end."""
    listed = first(count, batch)[index].long()
    capacity = kernels.CAPACITY.value
    from_list = listable & (listed <= capacity)
    i = torch.arange(vocabulary)
    a, ids = rows_of(logits, batch, stride, vocabulary)[index].float(), i.expand(len(index), -1)
    a = a / rows.temperature[:, None]
    longest = int(torch.where(from_list, listed, 0).max())
    assert longest <= vocabulary
    if bool(from_list.any()):
        short = torch.arange(longest) < listed[:, None]
        padding = (0, vocabulary - longest)
        for_a = torch.where(short, rows_of(listed_a, batch, capacity, longest)[index], -torch.inf)
        for_id = torch.where(short, rows_of(listed_id, batch, capacity, longest)[index], LAST_ID)
        mine = from_list[:, None]
        a = torch.where(mine, F.pad(for_a, padding, value=-torch.inf), a)
        ids = torch.where(mine, F.pad(for_id.long(), padding, value=LAST_ID), ids)
        if bool(from_list.all()):
            a, ids = a[:, : max(longest, 1)], ids[:, : max(longest, 1)]
    return a, ids


def draw_unlisted(
    index: Tensor, of_batch: RowParameters, logits: Tensor, stride: int, vocabulary: int,
    best: Tensor, listed_a: Tensor, listed_id: Tensor, count: Tensor, chunk_sums: Tensor,
    chunks: int, joint: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(token, g', log p, share of the row's mass that is kept) of these rows [R] of the batch."""
    batch, rows = of_batch.mode.shape[0], _of(of_batch, index)
    top_k, cuts = _limits(rows, vocabulary)
    top, total = _row_statistics(chunk_sums, chunks, batch, index)
    winner, log_mass = rows_of(best, batch, chunks, chunks)[index].amax(-1), torch.log(total)
    if bool(cuts.any()):
        source = (logits, stride, vocabulary, listed_a, listed_id, count)
        a, ids = _source(index, rows, batch, *source, cuts & (top_k == 0))
        order, last, kept_mass = kept_prefix(a, ids, rows, top_k, top, total, joint, vocabulary)
        mine, order, last = order_of(a), order[:, None], last[:, None]
        kept = (mine > order) | ((mine == order) & (ids <= last))
        keys = _keys_of(a, ids, rows).masked_fill_(~kept, NOTHING).amax(-1)
        winner, log_mass = (
            torch.where(cuts, new, old) for new, old in ((keys, winner), (kept_mass, log_mass))
        )
    token = token_of(winner)
    z = rows_of(logits, batch, stride, vocabulary)[index, token.clamp(max=vocabulary - 1)].float()
    logp = ((z / rows.temperature).double() - (top.double() + log_mass)).float()
    keys = (rows.seed, rows.position, rows.uid, rows.stream)
    noise = gumbel_noise(token[:, None], *keys)[:, 0]
    share = (log_mass.exp() / total).clamp(max=1.0).float()
    return token, logp + noise, logp, torch.where(cuts, share, 1.0)
