"""Discrete rows over the whole vocabulary, or over a part of it that no list of slots holds.

The token is the argmax of a + noise, a = z / T, over the kept tokens (Gumbel-max). What is kept is
a prefix of the order (a descending, id ascending), so it is a value and, among the tokens that tie
with it, a last id. Three steps find the prefix and draw:

    collect  tokens that may be kept go into a short list, by a bound from the chunk statistics
    cut      one program a row bisects the value (32 bits) and then the id over the list, or over
             the whole row where the list overflows or top_k is set
    draw     a fixed number of programs a row take the noise of the kept tokens; one records
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softgrpo_kernels.gpu.noise import gumbel
from softgrpo_kernels.gpu.soft_token.cut import cut_by_min_p, cut_by_top_k, cut_by_top_p, kept_of
from softgrpo_kernels.gpu.soft_token.keys import LOWEST, MAX_ID, order_of
from softgrpo_kernels.gpu.soft_token.row import TEMPERATURE, Row, float_of, noise_key
from softgrpo_kernels.gpu.soft_token.statistics import COLUMNS, MAXIMUM
from softgrpo_kernels.gpu.soft_token.vocabulary_row import (
    CHUNK,
    Scale,
    Source,
    is_mine,
    limits_of,
    load_source,
    row_mass,
    unit_of,
)
from softgrpo_kernels.row_parameters import RowParameters
from softgrpo_kernels.soft_token_tensors import SoftToken

CAPACITY = tl.constexpr(8192)
SPLITS = tl.constexpr(32)
DRAW_BLOCK = tl.constexpr(1024)


def sample_full_vocabulary(
    logits: Tensor,
    rows: RowParameters,
    out: SoftToken,
    chunk: Tensor,
    *,
    joint: bool,
) -> None:
    """Writes the rows of `rows.unlisted` that are valid; all others are left as they are.

    Args:
        logits: [B, V] float32, bfloat16 or float16, last axis contiguous.
        out: filled with padding (and `valid`) where a row is to be written.
        chunk: fp32 [B, cdiv(V, 4096), COLUMNS], the statistics of the row at its temperature.
        joint: top-p counts the mass of the whole vocabulary even where top_k is set.
    """
    batch, vocabulary = logits.shape
    if batch == 0:
        return
    device = logits.device
    count = torch.zeros(batch, dtype=torch.int32, device=device)
    listed_a = torch.empty((batch, CAPACITY.value), dtype=torch.float32, device=device)
    listed_id = torch.empty((batch, CAPACITY.value), dtype=torch.int32, device=device)
    cut = torch.empty((batch, 2), dtype=torch.int32, device=device)
    lse = torch.empty(batch, dtype=torch.float64, device=device)
    best = torch.empty((batch, SPLITS.value), dtype=torch.float32, device=device)
    best_id = torch.empty((batch, SPLITS.value), dtype=torch.int32, device=device)
    chunks = triton.cdiv(vocabulary, CHUNK.value)
    row_arguments = (rows.floats, rows.ints, out.valid, batch, rows.k_max)
    source = (logits, logits.stride(0), vocabulary, listed_a, listed_id, count)
    options = {"enable_fp_fusion": False}
    padded = triton.next_power_of_2(chunks)
    collect_kernel[(chunks, batch)](
        *row_arguments, *source, chunk, chunks, padded, num_warps=8, **options
    )
    cut_kernel[(batch,)](
        *row_arguments, *source, chunk, chunks, padded, cut, lse, out.kept_mass, joint,
        out.kept_mass is not None, num_warps=16, **options,
    )  # fmt: skip
    draw_kernel[(SPLITS.value, batch)](
        *row_arguments, *source, cut, best, best_id, num_warps=8, **options
    )
    record_kernel[(batch,)](
        *row_arguments, logits, logits.stride(0), best, best_id, lse,
        out.ids, out.gprime, out.weights, out.logp, out.n, out.token, out.token_logp,
        num_warps=4, **options,
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "k_max", "chunks"])
def collect_kernel(
    floats, ints, valid, batch, k_max, logits, stride, vocabulary, listed_a, listed_id, count,
    chunk, chunks, PADDED: tl.constexpr,
):  # fmt: skip
    """Program (c, b): the tokens of chunk c of row b that may be kept."""
    part, index = tl.program_id(0), tl.program_id(1)
    row = Row(floats, ints, batch, index, k_max)
    if not is_mine(row, valid):
        return
    limits = limits_of(row, vocabulary)
    if (not limits.cuts) | (limits.top_k > 0):
        return
    chunk += index.to(tl.int64) * chunks * COLUMNS
    top, total = row_mass(chunk, chunks, PADDED)
    # All tokens under p = (1 - top_p) / V together have less than 1 - top_p: none is kept.
    rare = tl.where(limits.top_p < 1, (1 - limits.top_p) * total.to(tl.float32) / vocabulary, 0.0)
    # 0.1 %: the bound itself is rounded.
    bound = top + tl.log(tl.maximum(rare, limits.min_p)) - 1e-3
    if tl.load(chunk + part * COLUMNS + MAXIMUM) < bound:
        return
    i = part * CHUNK + tl.arange(0, CHUNK)
    z = tl.load(logits + index.to(tl.int64) * stride + i, mask=i < vocabulary, other=-float("inf"))
    a = tl.div_rn(z.to(tl.float32), limits.temperature)
    found = (a >= bound) & (a > -float("inf"))
    number = tl.sum(found.to(tl.int32), 0)
    # The order in which chunks append is of no consequence.
    place = tl.atomic_add(count + index, number, sem="relaxed")
    place += tl.cumsum(found.to(tl.int32), 0) - 1
    fits = found & (place < CAPACITY)
    base = index.to(tl.int64) * CAPACITY
    tl.store(listed_a + base + place, a, mask=fits)
    tl.store(listed_id + base + place, i, mask=fits)


@triton.jit
def _source(index, logits, stride, vocabulary, listed_a, listed_id, count, limits):
    """The list where the row may have one and it holds all, or the row itself."""
    listed = tl.load(count + index)
    from_list = limits.cuts & (limits.top_k == 0) & (listed <= CAPACITY)
    index = index.to(tl.int64)
    return Source(
        logits + index * stride, vocabulary, listed_a + index * CAPACITY,
        listed_id + index * CAPACITY, from_list, tl.where(from_list, listed, vocabulary),
        limits.temperature,
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "k_max", "chunks"])
def cut_kernel(
    floats, ints, valid, batch, k_max, logits, stride, vocabulary, listed_a, listed_id, count,
    chunk, chunks, PADDED: tl.constexpr, cut, lse, out_kept_mass, JOINT: tl.constexpr,
    KEPT_MASS: tl.constexpr,
):  # fmt: skip
    """Program b: what is kept of row b, (order, last id of those that tie with it), and its lse;
    where asked for, the share of the row's mass that is kept."""
    index = tl.program_id(0)
    row = Row(floats, ints, batch, index, k_max)
    if not is_mine(row, valid):
        return
    limits = limits_of(row, vocabulary)
    chunk += index.to(tl.int64) * chunks * COLUMNS
    top, total = row_mass(chunk, chunks, PADDED)
    if not limits.cuts:
        # All that is larger than -inf.
        tl.store(cut + index * 2, LOWEST)
        tl.store(cut + index * 2 + 1, -1)
        tl.store(lse + index, top.to(tl.float64) + tl.log(total))
        if KEPT_MASS:
            tl.store(out_kept_mass + index, 1.0)
        return

    source = _source(index, logits, stride, vocabulary, listed_a, listed_id, count, limits)
    scale = Scale(top, unit_of(total), chunk)
    # Kept is every token above `order`, and of those that tie with it the first `free`.
    whole = total
    order = tl.full((), LOWEST, tl.int32)
    free = tl.zeros((), tl.int64)
    if limits.top_k > 0:
        order, free, total = cut_by_top_k(source, scale, limits.top_k, total, JOINT)
    if limits.top_p < 1:
        order, free = cut_by_top_p(source, scale, limits.top_p, total, order, free)
    if limits.min_p > 0:
        order, free = cut_by_min_p(scale, limits.min_p, order, free)
    last, mass = kept_of(source, scale, order, free)
    tl.store(cut + index * 2, order)
    tl.store(cut + index * 2 + 1, last)
    tl.store(lse + index, top.to(tl.float64) + tl.log(mass))
    if KEPT_MASS:
        tl.store(out_kept_mass + index, (mass / tl.maximum(whole, mass)).to(tl.float32))


@triton.jit(do_not_specialize=["batch", "k_max"])
def draw_kernel(
    floats, ints, valid, batch, k_max, logits, stride, vocabulary, listed_a, listed_id, count,
    cut, best, best_id,
):  # fmt: skip
    """Program (s, b): the best of the kept tokens of blocks s, s + SPLITS ... of row b."""
    part, index = tl.program_id(0), tl.program_id(1)
    row = Row(floats, ints, batch, index, k_max)
    if not is_mine(row, valid):
        return
    limits = limits_of(row, vocabulary)
    source = _source(index, logits, stride, vocabulary, listed_a, listed_id, count, limits)
    cut_order, cut_id = tl.load(cut + index * 2), tl.load(cut + index * 2 + 1)
    key = noise_key(row)
    value = tl.full((), -float("inf"), tl.float32)
    winner = tl.full((), MAX_ID, tl.int32)
    for start in range(part * DRAW_BLOCK, source.size, SPLITS * DRAW_BLOCK):
        a, ids = load_source(source, start, DRAW_BLOCK)
        order = order_of(a)
        kept = (order > cut_order) | ((order == cut_order) & (ids <= cut_id))
        if tl.max(kept.to(tl.int32), 0) > 0:
            perturbed = tl.where(kept, a + gumbel(ids, key), -float("inf"))
            top = tl.max(perturbed, 0)
            first = tl.min(tl.where(perturbed == top, ids, MAX_ID), 0)
            better = (top > value) | ((top == value) & (first < winner))
            value = tl.where(better, top, value)
            winner = tl.where(better, first, winner)
    tl.store(best + index * SPLITS + part, value)
    tl.store(best_id + index * SPLITS + part, winner)


@triton.jit(do_not_specialize=["batch", "k_max"])
def record_kernel(
    floats, ints, valid, batch, k_max, logits, stride, best, best_id, lse,
    out_ids, out_gprime, out_weights, out_logp, out_n, out_token, out_token_logp,
):  # fmt: skip
    """Program b: the best of all programs that drew from row b."""
    index = tl.program_id(0)
    row = Row(floats, ints, batch, index, k_max)
    if not is_mine(row, valid):
        return
    i = tl.arange(0, SPLITS)
    value = tl.load(best + index * SPLITS + i)
    ids = tl.load(best_id + index * SPLITS + i)
    token = tl.min(tl.where(value == tl.max(value, 0), ids, MAX_ID), 0)
    z = tl.load(logits + index.to(tl.int64) * stride + token).to(tl.float32)
    a = tl.div_rn(z, float_of(row, TEMPERATURE))
    logp = (a.to(tl.float64) - tl.load(lse + index)).to(tl.float32)
    slot = index.to(tl.int64) * k_max
    tl.store(out_ids + slot, token)
    tl.store(out_gprime + slot, logp + gumbel(token, noise_key(row)))
    tl.store(out_weights + slot, 1.0)
    tl.store(out_logp + slot, logp)
    tl.store(out_n + index, 1)
    tl.store(out_token + index, token)
    tl.store(out_token_logp + index, logp)
