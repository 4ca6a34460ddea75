"""Discrete rows over the whole vocabulary, or over a part of it that no list of slots holds.

The token is the argmax of a + noise, a = z / T, over the kept tokens (Gumbel-max). What is kept is
a prefix of the order (a descending, id ascending), so it is a value and, among the tokens that tie
with it, a last id. Many programs prepare a row, and the one that finishes it draws:

    collect  where nothing is cut, every chunk leaves the best of its tokens; else the tokens that
             may be kept, by a bound from the chunk statistics, go into a short list and their
             masses into a histogram
    draw     finds the value in a bin of the histogram and then the id, in the list, or in the whole
             row where the list overflows or top_k is set; then takes the noise of what is kept
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from softgrpo_kernels.gpu.noise import gumbel
from softgrpo_kernels.gpu.soft_token.cut import kept_prefix
from softgrpo_kernels.gpu.soft_token.keys import LOWEST, NOTHING, key_of, order_of, token_of
from softgrpo_kernels.gpu.soft_token.row import Places, is_unlisted, noise_key, row_of
from softgrpo_kernels.gpu.soft_token.row_rules import row_is_sound
from softgrpo_kernels.gpu.soft_token.rows import Rows
from softgrpo_kernels.gpu.soft_token.statistics import BINS, COLUMNS, MAXIMUM
from softgrpo_kernels.gpu.soft_token.vocabulary_row import (
    CHUNK,
    Scale,
    Source,
    bin_of,
    limits_of,
    load_source,
    mass_of,
    row_mass,
    unit_of,
)

CAPACITY = tl.constexpr(8192)
DRAW_BLOCK = tl.constexpr(1024)


class Collected(NamedTuple):
    """What is prepared of the rows. best: int64 [B, chunks], the key of the best token of each
    chunk; listed_a fp32, listed_id int32 [B, CAPACITY]: tokens that may be kept, in any order;
    length: int32 [B], how many there are, more than CAPACITY where they do not fit; histogram:
    int64 [B, BINS], their masses."""

    best: Tensor
    listed_a: Tensor
    listed_id: Tensor
    length: Tensor
    histogram: Tensor


def collect(
    logits: Tensor, chunk_sums: Tensor, rows: Rows, count: Tensor, histogram: Tensor
) -> Collected:
    """Prepares the unlisted rows of logits [B, V]; the others hold anything. count, histogram: 0
    before."""
    (batch, vocabulary), chunks, device = logits.shape, chunk_sums.shape[1], logits.device
    collected = Collected(
        torch.empty((batch, chunks), dtype=torch.int64, device=device),
        torch.empty((batch, CAPACITY.value), dtype=torch.float32, device=device),
        torch.empty((batch, CAPACITY.value), dtype=torch.int32, device=device),
        count,
        histogram,
    )
    collect_kernel[(batch * chunks,)](
        *collected, chunk_sums, logits, logits.stride(0), vocabulary, chunks, rows.floats,
        rows.ints, rows.columns, rows.k_max, *rows.places,
        PADDED=triton.next_power_of_2(chunks), num_warps=16, enable_fp_fusion=False,
    )  # fmt: skip
    return collected


@triton.jit(do_not_specialize=["chunks", "columns", "k_max"])
def collect_kernel(
    best, listed_a, listed_id, count, histogram, chunk_sums, logits, stride, vocabulary, chunks,
    floats, ints, columns, k_max, at_row, at_step, phases, PADDED: tl.constexpr,
):  # fmt: skip
    """Program b chunks + c: chunk c of row b."""
    index, part = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    row = row_of(index, floats, ints, columns, k_max, Places(at_row, at_step, phases))
    if not is_unlisted(row):
        return
    # Below a temperature of 0 the bins would be negative: nothing may be added there.
    if not row_is_sound(row):
        return
    limits = limits_of(row, vocabulary)
    collected = Collected(best, listed_a, listed_id, count, histogram)
    source = source_of(index, logits + index * stride, vocabulary, collected, limits)
    if not limits.cuts:
        winner = best_perturbed(source, LOWEST, -1, noise_key(row), part * CHUNK, CHUNK)
        tl.store(best + index * chunks + part, winner)
    elif limits.top_k == 0:
        _list(source, limits, index, chunk_sums + index * chunks * COLUMNS, part, chunks, PADDED)


@triton.jit
def _list(source, limits, index, chunk_sums, part, chunks, PADDED: tl.constexpr):
    """Adds the tokens of a chunk that may be kept to the row's list."""
    top, total = row_mass(chunk_sums, chunks, PADDED)
    # All tokens under p = (1 - top_p) / V together have less than 1 - top_p: none is kept.
    rare = (1 - limits.top_p) * total.to(tl.float32) / source.vocabulary
    rare = tl.where(limits.top_p < 1, rare, 0.0)
    # 0.1 %: the bound itself is rounded.
    bound = top + tl.log(tl.maximum(rare, limits.min_p)) - 1e-3
    # A maximum of +inf has no bins: such a row is not valid.
    if (tl.load(chunk_sums + part * COLUMNS + MAXIMUM) >= bound) & (top < float("inf")):
        i = part * CHUNK + tl.arange(0, CHUNK)
        z = tl.load(source.logits + i, mask=i < source.vocabulary, other=-float("inf"))
        a = tl.div_rn(z.to(tl.float32), limits.temperature)
        found = (a >= bound) & (a > -float("inf"))
        number = tl.sum(found.to(tl.int32), 0)
        # The order in which chunks append is of no consequence.
        place = tl.atomic_add(source.length, number, sem="relaxed")
        place += tl.cumsum(found.to(tl.int32), 0) - 1
        fits = found & (place < CAPACITY)
        tl.store(source.listed_a + place, a, mask=fits)
        tl.store(source.listed_id + place, i, mask=fits)
        mass = mass_of(a, top, unit_of(total))
        tl.atomic_add(source.histogram + bin_of(a, top), mass, mask=found, sem="relaxed")


@triton.jit
def source_of(index, logits, vocabulary, collected, limits):
    """The list where the row may have one and it holds all, or the row itself."""
    length = collected.length + index
    listed = tl.load(length)
    from_list = limits.cuts & (limits.top_k == 0) & (listed <= CAPACITY)
    return Source(
        logits, vocabulary, collected.listed_a + index * CAPACITY,
        collected.listed_id + index * CAPACITY, length,
        collected.histogram + index * BINS, from_list,
        tl.where(from_list, listed, vocabulary), limits.temperature,
    )  # fmt: skip


@triton.jit
def best_perturbed(source, cut_order, cut_id, key, begin, length):
    """The key of the best kept token among some of the source: a + noise, and the id."""
    best = tl.full((), NOTHING, tl.int64)
    for start in range(begin, begin + length, DRAW_BLOCK):
        a, ids = load_source(source, start, DRAW_BLOCK)
        order = order_of(a)
        kept = (order > cut_order) | ((order == cut_order) & (ids <= cut_id))
        if tl.max(kept.to(tl.int32), 0) > 0:
            found = tl.where(kept, key_of(a + gumbel(ids, key), ids), NOTHING)
            best = tl.maximum(best, tl.max(found, 0))
    return best


@triton.jit
def draw_from_vocabulary(
    row, index, slot, vocabulary_row, collected, PADDED: tl.constexpr, JOINT: tl.constexpr
):
    """(token, g', log p) of every slot of an unlisted row, which fills the first; and the share of
    the row's mass that is kept."""
    logits, vocabulary = vocabulary_row.logits, vocabulary_row.vocabulary
    chunk_sums, chunks = vocabulary_row.chunk_sums, vocabulary_row.chunks
    limits = limits_of(row, vocabulary)
    top, total = row_mass(chunk_sums, chunks, PADDED)
    key, mass = noise_key(row), total
    if limits.cuts:
        source = source_of(index, logits, vocabulary, collected, limits)
        scale = Scale(top, unit_of(total), chunk_sums)
        order, last, mass = kept_prefix(source, scale, limits, total, JOINT)
        winner = best_perturbed(source, order, last, key, 0, source.size)
    else:
        part = tl.arange(0, PADDED)
        chunk_best = collected.best + index * chunks + part
        winner = tl.max(tl.load(chunk_best, mask=part < chunks, other=NOTHING), axis=0)
    token = token_of(winner)
    a = tl.div_rn(tl.load(logits + token).to(tl.float32), limits.temperature)
    logp = (a.to(tl.float64) - (top.to(tl.float64) + tl.log(mass))).to(tl.float32)
    gprime = logp + gumbel(token, key)
    used = slot == 0
    return (
        tl.where(used, token, -1), tl.where(used, gprime, -float("inf")),
        tl.where(used, logp, -float("inf")), (mass / tl.maximum(total, mass)).to(tl.float32),
    )  # fmt: skip
