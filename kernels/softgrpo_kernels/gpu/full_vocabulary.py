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
from softgrpo_kernels.gpu.vocabulary_row import (
    CHUNK,
    LOWEST,
    MAX_ID,
    is_mine,
    key_of,
    limits_of,
    load_source,
    mass_above,
    mass_of,
    row_statistics,
    tied_up_to,
    unit_of,
    value_of,
)
from softgrpo_kernels.rows import RowParameters
from softgrpo_kernels.step import SoftToken

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
        chunk: fp32 [B, cdiv(V, 4096), 4], the statistics of the row at its temperature.
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
        *row_arguments, *source, chunk, chunks, padded, cut, lse, joint, num_warps=16, **options
    )
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
    part, row = tl.program_id(0), tl.program_id(1)
    if not is_mine(floats, ints, valid, batch, k_max, row):
        return
    temperature, top_k, top_p, min_p, limited = limits_of(floats, ints, batch, row, vocabulary)
    if (not limited) | (top_k > 0):
        return
    top, total = row_statistics(chunk, chunks, row, PADDED)
    # All tokens under p = (1 - top_p) / V together have less than 1 - top_p: none is kept.
    rare = tl.where(top_p < 1, (1 - top_p) * total.to(tl.float32) / vocabulary, 0.0)
    # 0.1 %: the bound itself is rounded.
    bound = top + tl.log(tl.maximum(rare, min_p)) - 1e-3
    if tl.load(chunk + (row.to(tl.int64) * chunks + part) * 4) < bound:
        return
    i = part * CHUNK + tl.arange(0, CHUNK)
    z = tl.load(logits + row.to(tl.int64) * stride + i, mask=i < vocabulary, other=-float("inf"))
    a = tl.div_rn(z.to(tl.float32), temperature)
    found = (a >= bound) & (a > -float("inf"))
    number = tl.sum(found.to(tl.int32), 0)
    # The order in which chunks append is of no consequence.
    place = tl.atomic_add(count + row, number, sem="relaxed")
    place += tl.cumsum(found.to(tl.int32), 0) - 1
    fits = found & (place < CAPACITY)
    base = row.to(tl.int64) * CAPACITY
    tl.store(listed_a + base + place, a, mask=fits)
    tl.store(listed_id + base + place, i, mask=fits)


@triton.jit(do_not_specialize=["batch", "k_max", "chunks"])
def cut_kernel(
    floats, ints, valid, batch, k_max, logits, stride, vocabulary, listed_a, listed_id, count,
    chunk, chunks, PADDED: tl.constexpr, cut, lse, JOINT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if not is_mine(floats, ints, valid, batch, k_max, row):
        return
    temperature, top_k, top_p, min_p, limited = limits_of(floats, ints, batch, row, vocabulary)
    top, total = row_statistics(chunk, chunks, row, PADDED)
    if not limited:
        # All that is larger than -inf.
        tl.store(cut + row * 2, LOWEST)
        tl.store(cut + row * 2 + 1, -1)
        tl.store(lse + row, top.to(tl.float64) + tl.log(total))
        return

    logits += row.to(tl.int64) * stride
    listed_a += row.to(tl.int64) * CAPACITY
    listed_id += row.to(tl.int64) * CAPACITY
    maxima = chunk + row.to(tl.int64) * chunks * 4
    listed = tl.load(count + row)
    from_list = (top_k == 0) & (listed <= CAPACITY)
    size = tl.where(from_list, listed, vocabulary)
    highest = key_of(top)
    unit = unit_of(total)
    wide_unit = unit.to(tl.float64)

    # Kept is every key above `key`, and of those equal to it the first `free`.
    key = tl.full((), LOWEST, tl.int32)
    free = tl.zeros((), tl.int64)
    if top_k > 0:
        low = tl.full((), LOWEST, tl.int64)
        high = highest.to(tl.int64)
        number, mass = mass_above(
            logits, vocabulary, listed_a, listed_id, from_list, size, temperature, top, unit, key,
            maxima,
        )  # fmt: skip
        if number > top_k:
            while high - low > 1:
                middle = (low + high) >> 1
                number, mass = mass_above(
                    logits, vocabulary, listed_a, listed_id, from_list, size, temperature, top,
                    unit, middle.to(tl.int32), maxima,
                )  # fmt: skip
                low = tl.where(number < top_k, low, middle)
                high = tl.where(number < top_k, middle, high)
            key = high.to(tl.int32)
            number, mass = mass_above(
                logits, vocabulary, listed_a, listed_id, from_list, size, temperature, top, unit,
                key, maxima,
            )  # fmt: skip
            free = top_k - number
        if not JOINT:
            mass += free * mass_of(value_of(key), top, unit)
            total = mass.to(tl.float64) / wide_unit
    if top_p < 1:
        # The lowest key whose first token has less than top_p before it.
        limit = top_p.to(tl.float64) * total * wide_unit
        low = key.to(tl.int64) - 1
        high = highest.to(tl.int64)
        while high - low > 1:
            middle = (low + high) >> 1
            number, mass = mass_above(
                logits, vocabulary, listed_a, listed_id, from_list, size, temperature, top, unit,
                middle.to(tl.int32), maxima,
            )  # fmt: skip
            inside = mass.to(tl.float64) < limit
            low = tl.where(inside, low, middle)
            high = tl.where(inside, middle, high)
        number, mass = mass_above(
            logits, vocabulary, listed_a, listed_id, from_list, size, temperature, top, unit,
            high.to(tl.int32), maxima,
        )  # fmt: skip
        each = tl.maximum(mass_of(value_of(high.to(tl.int32)), top, unit), 1).to(tl.float64)
        # Token i of the tied has i times their mass before it, too.
        fits = tl.ceil((limit - mass.to(tl.float64)) / each).to(tl.int64)
        # The first token of all is always kept.
        fits = tl.maximum(fits, 1)
        free = tl.where((high > key) | (fits < free), fits, free)
        key = high.to(tl.int32)
    if min_p > 0:
        exact = top.to(tl.float64) + tl.log(min_p.to(tl.float64))
        near = exact.to(tl.float32)
        least = key_of(near) + (near.to(tl.float64) < exact).to(tl.int32)
        free = tl.where(least > key, 2147483647, free)
        key = tl.maximum(key, least)

    number, mass = mass_above(
        logits, vocabulary, listed_a, listed_id, from_list, size, temperature, top, unit, key,
        maxima,
    )  # fmt: skip
    tied = tied_up_to(
        logits, vocabulary, listed_a, listed_id, from_list, size, temperature, key, MAX_ID - 1,
        maxima,
    )  # fmt: skip
    low = tl.full((), -1, tl.int64)
    high = tl.full((), -1, tl.int64) + vocabulary
    if (free < tied) & (free > 0):
        while high - low > 1:
            middle = (low + high) >> 1
            enough = tied_up_to(
                logits, vocabulary, listed_a, listed_id, from_list, size, temperature, key,
                middle.to(tl.int32), maxima,
            ) >= free  # fmt: skip
            low = tl.where(enough, low, middle)
            high = tl.where(enough, middle, high)
    mass += tl.minimum(free, tied) * mass_of(value_of(key), top, unit)
    tl.store(cut + row * 2, key)
    tl.store(cut + row * 2 + 1, tl.where(free > 0, high, -1).to(tl.int32))
    tl.store(lse + row, top.to(tl.float64) + tl.log(mass.to(tl.float64) / wide_unit))


@triton.jit(do_not_specialize=["batch", "k_max"])
def draw_kernel(
    floats, ints, valid, batch, k_max, logits, stride, vocabulary, listed_a, listed_id, count,
    cut, best, best_id,
):  # fmt: skip
    part, row = tl.program_id(0), tl.program_id(1)
    if not is_mine(floats, ints, valid, batch, k_max, row):
        return
    temperature, top_k, _top_p, _min_p, limited = limits_of(floats, ints, batch, row, vocabulary)
    logits += row.to(tl.int64) * stride
    listed_a += row.to(tl.int64) * CAPACITY
    listed_id += row.to(tl.int64) * CAPACITY
    listed = tl.load(count + row)
    from_list = limited & (top_k == 0) & (listed <= CAPACITY)
    size = tl.where(from_list, listed, vocabulary)
    cut_key, cut_id = tl.load(cut + row * 2), tl.load(cut + row * 2 + 1)
    seed, position = tl.load(ints + batch + row), tl.load(ints + 2 * batch + row)
    uid, stream = tl.load(ints + 3 * batch + row), tl.load(ints + 4 * batch + row)
    value = tl.full((), -float("inf"), tl.float32)
    winner = tl.full((), MAX_ID, tl.int32)
    for start in range(part * DRAW_BLOCK, size, SPLITS * DRAW_BLOCK):
        a, ids = load_source(
            logits, vocabulary, listed_a, listed_id, from_list, size, temperature, start, DRAW_BLOCK
        )
        key = key_of(a)
        kept = (key > cut_key) | ((key == cut_key) & (ids <= cut_id))
        if tl.max(kept.to(tl.int32), 0) > 0:
            noise = gumbel(ids, seed, position, uid, stream)
            perturbed = tl.where(kept, a + noise, -float("inf"))
            top = tl.max(perturbed, 0)
            first = tl.min(tl.where(perturbed == top, ids, MAX_ID), 0)
            better = (top > value) | ((top == value) & (first < winner))
            value = tl.where(better, top, value)
            winner = tl.where(better, first, winner)
    tl.store(best + row * SPLITS + part, value)
    tl.store(best_id + row * SPLITS + part, winner)


@triton.jit(do_not_specialize=["batch", "k_max"])
def record_kernel(
    floats, ints, valid, batch, k_max, logits, stride, best, best_id, lse,
    out_ids, out_gprime, out_weights, out_logp, out_n, out_token, out_token_logp,
):  # fmt: skip
    row = tl.program_id(0)
    if not is_mine(floats, ints, valid, batch, k_max, row):
        return
    i = tl.arange(0, SPLITS)
    value = tl.load(best + row * SPLITS + i)
    ids = tl.load(best_id + row * SPLITS + i)
    token = tl.min(tl.where(value == tl.max(value, 0), ids, MAX_ID), 0)
    seed, position = tl.load(ints + batch + row), tl.load(ints + 2 * batch + row)
    uid, stream = tl.load(ints + 3 * batch + row), tl.load(ints + 4 * batch + row)
    z = tl.load(logits + row.to(tl.int64) * stride + token).to(tl.float32)
    a = tl.div_rn(z, tl.load(floats + row))
    logp = (a.to(tl.float64) - tl.load(lse + row)).to(tl.float32)
    slot = row.to(tl.int64) * k_max
    tl.store(out_ids + slot, token)
    tl.store(out_gprime + slot, logp + gumbel(token, seed, position, uid, stream))
    tl.store(out_weights + slot, 1.0)
    tl.store(out_logp + slot, logp)
    tl.store(out_n + row, 1)
    tl.store(out_token + row, token)
    tl.store(out_token_logp + row, logp)
