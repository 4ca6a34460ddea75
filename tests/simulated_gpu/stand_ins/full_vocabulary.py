"""Stand-ins for the kernels of `softgrpo_kernels.gpu.soft_token.full_vocabulary`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from softgrpo_kernels.gpu.soft_token import full_vocabulary as kernels
from softgrpo_kernels.gpu.soft_token.statistics import CHUNK
from softgrpo_kernels.row_parameters import RowParameters
from softgrpo_kernels.row_rules import DISCRETE

from .gumbel_noise import gumbel_noise
from .kept_prefix import kept_prefix
from .keys import LAST_ID, LOWEST, NOTHING, key_of, order_of, token_of, value_of
from .memory import first, parameters, rows_of

Grid = tuple[int, ...]


def _mine(
    floats: Tensor, ints: Tensor, valid: Tensor, batch: int, k_max: int
) -> tuple[Tensor, RowParameters] | None:
    """Index of the rows to be written, and their parameters."""
    rows = parameters(floats, ints, batch, k_max)
    each = zip(rows.mode.tolist(), rows.top_k.tolist(), first(valid, batch).tolist(), strict=True)
    mine = [
        b for b, (mode, top_k, good) in enumerate(each)
        if mode == DISCRETE and not 1 <= top_k <= k_max and good
    ]  # fmt: skip
    if not mine:
        return None
    index = torch.tensor(mine)
    return index, RowParameters(rows.floats[:, index], rows.ints[:, index], k_max)


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
    floats: Tensor,
    ints: Tensor,
    valid: Tensor,
    batch: int,
    k_max: int,
    logits: Tensor,
    stride: int,
    vocabulary: int,
    listed_a: Tensor,
    listed_id: Tensor,
    count: Tensor,
    chunk: Tensor,
    chunks: int,
    PADDED: int,
) -> None:
    assert grid == (chunks, batch)
    assert (chunks - 1) * CHUNK < vocabulary <= chunks * CHUNK
    assert chunks <= PADDED
    mine = _mine(floats, ints, valid, batch, k_max)
    if mine is None:
        return
    index, rows = mine
    top_k, limited = _limits(rows, vocabulary)
    chosen = limited & (top_k == 0)
    if not bool(chosen.any()):
        return
    index, rows = index[chosen], RowParameters(rows.floats[:, chosen], rows.ints[:, chosen], k_max)
    top, total = _row_statistics(chunk, chunks, batch, index)
    rare = torch.where(rows.top_p < 1, (1 - rows.top_p) * total.float() / vocabulary, 0.0)
    bound = (top + torch.log(torch.maximum(rare, rows.min_p)) - 1e-3)[:, None]
    a_RV = rows_of(logits, batch, stride, vocabulary)[index].float() / rows.temperature[:, None]
    found = (a_RV >= bound) & (a_RV > -torch.inf)
    capacity = kernels.CAPACITY.value
    number = first(count, batch)
    place = number[index, None] + found.cumsum(-1) - 1
    number[index] += found.sum(-1).int()
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


def cut_kernel(
    grid: Grid,
    floats: Tensor,
    ints: Tensor,
    valid: Tensor,
    batch: int,
    k_max: int,
    logits: Tensor,
    stride: int,
    vocabulary: int,
    listed_a: Tensor,
    listed_id: Tensor,
    count: Tensor,
    chunk: Tensor,
    chunks: int,
    PADDED: int,
    cut: Tensor,
    lse: Tensor,
    out_kept_mass: Tensor | None,
    JOINT: bool,
    KEPT_MASS: bool,
) -> None:
    assert grid == (batch,)
    assert chunks <= PADDED
    mine = _mine(floats, ints, valid, batch, k_max)
    if mine is None:
        return
    index, rows = mine
    top_k, limited = _limits(rows, vocabulary)
    top, total = _row_statistics(chunk, chunks, batch, index)
    key, last = torch.full_like(top, LOWEST, dtype=torch.int64), torch.full_like(top_k, -1)
    log_mass = torch.log(total)
    if bool(limited.any()):
        source = (logits, stride, vocabulary, listed_a, listed_id, count)
        a, ids = _source(index, rows, batch, *source, top_k == 0)
        found = kept_prefix(a, ids, rows, top_k, top, total, JOINT, vocabulary)
        key, last, log_mass = (
            torch.where(limited, new, old)
            for new, old in zip(found, (key, last, log_mass), strict=True)
        )
    rows_of(cut, batch, 2, 2)[index] = torch.stack((key, last), -1).int()
    first(lse, batch)[index] = top.double() + log_mass
    if KEPT_MASS:
        assert out_kept_mass is not None
        share = torch.where(limited, (log_mass.exp() / total).clamp(max=1.0), 1.0)
        first(out_kept_mass, batch)[index] = share.float()


def draw_kernel(
    grid: Grid,
    floats: Tensor,
    ints: Tensor,
    valid: Tensor,
    batch: int,
    k_max: int,
    logits: Tensor,
    stride: int,
    vocabulary: int,
    listed_a: Tensor,
    listed_id: Tensor,
    count: Tensor,
    cut: Tensor,
    best: Tensor,
    best_id: Tensor,
) -> None:
    splits, block = kernels.SPLITS.value, kernels.DRAW_BLOCK.value
    assert grid == (splits, batch)
    mine = _mine(floats, ints, valid, batch, k_max)
    if mine is None:
        return
    index, rows = mine
    top_k, limited = _limits(rows, vocabulary)
    source = (logits, stride, vocabulary, listed_a, listed_id, count)
    a, ids = _source(index, rows, batch, *source, limited & (top_k == 0))
    cut_key, cut_id = rows_of(cut, batch, 2, 2)[index].unsqueeze(-1).unbind(1)
    order = order_of(a)
    kept = (order > cut_key) | ((order == cut_key) & (ids <= cut_id))
    noise = gumbel_noise(ids, rows.seed, rows.position, rows.uid, rows.stream)
    keys = torch.where(kept, key_of(a + noise, ids), NOTHING)
    # Program s takes the blocks s, s + splits, ... of the source.
    blocks = -(-keys.shape[1] // block)
    if blocks > 1:
        keys = F.pad(keys, (0, blocks * block - keys.shape[1]), value=NOTHING)
    winner = keys.view(len(index), blocks, -1).amax(-1)
    winner = F.pad(winner, (0, -blocks % splits), value=NOTHING)
    winner = winner.view(len(index), -1, splits).amax(1)
    found = winner != NOTHING
    value = torch.where(found, value_of(winner), -torch.inf)
    rows_of(best, batch, splits, splits)[index] = value
    token = torch.where(found, token_of(winner), LAST_ID)
    rows_of(best_id, batch, splits, splits)[index] = token.int()


def record_kernel(
    grid: Grid,
    floats: Tensor,
    ints: Tensor,
    valid: Tensor,
    batch: int,
    k_max: int,
    logits: Tensor,
    stride: int,
    best: Tensor,
    best_id: Tensor,
    lse: Tensor,
    out_ids: Tensor,
    out_gprime: Tensor,
    out_weights: Tensor,
    out_logp: Tensor,
    out_n: Tensor,
    out_token: Tensor,
    out_token_logp: Tensor,
) -> None:
    assert grid == (batch,)
    mine = _mine(floats, ints, valid, batch, k_max)
    if mine is None:
        return
    index, rows = mine
    splits = kernels.SPLITS.value
    value = rows_of(best, batch, splits, splits)[index]
    ids = rows_of(best_id, batch, splits, splits)[index].long()
    token = torch.where(value == value.amax(-1, keepdim=True), ids, LAST_ID).amin(-1)
    z = rows_of(logits, batch, stride, int(token.max()) + 1)[index, token].float()
    logp = ((z / rows.temperature).double() - first(lse, batch)[index]).float()
    keys = (rows.seed, rows.position, rows.uid, rows.stream)
    noise = gumbel_noise(token[:, None], *keys)[:, 0]
    for target, x in (
        (out_ids, token.int()), (out_gprime, logp + noise), (out_weights, torch.ones_like(logp)),
        (out_logp, logp),
    ):  # fmt: skip
        rows_of(target, batch, k_max, 1)[index, 0] = x
    for target, x in (
        (out_n, torch.ones_like(token)), (out_token, token), (out_token_logp, logp),
    ):  # fmt: skip
        first(target, batch)[index] = x.to(target.dtype)
