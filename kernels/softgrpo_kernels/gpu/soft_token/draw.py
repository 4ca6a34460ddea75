"""Device functions from the first candidates of a row to its soft token."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from softgrpo_kernels.gpu.soft_token.keys import (
    NOTHING,
    key_of,
    sorted_candidates,
    token_of,
    value_of,
)
from softgrpo_kernels.gpu.soft_token.perturb import perturb
from softgrpo_kernels.gpu.soft_token.row import (
    EPS,
    MIN_P,
    MODE,
    SOFT,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    float_of,
    int_of,
)
from softgrpo_kernels.gpu.soft_token.statistics import (
    BAD,
    MASS,
    MAXIMUM,
    WEIGHTED,
    below_top,
    load_chunks,
)
from softgrpo_kernels.gpu.softcap import scaled_and_capped


class VocabularyRow(NamedTuple):
    """The logits of a row, and what the statistics kernel says of them."""

    logits: tl.tensor
    vocabulary: tl.tensor
    tile_max: tl.tensor
    tiles: tl.tensor
    chunk_sums: tl.tensor
    chunks: tl.tensor


class Sums(NamedTuple):
    """Of a row over the vocabulary, a = z / T: its maximum, sum exp(d) and, where asked for, sum
    exp(d) d with d = a - top, and whether a logit is NaN or +inf."""

    top: tl.tensor
    mass: tl.tensor
    weighted: tl.tensor
    bad: tl.tensor


class Head(NamedTuple):
    """The LM head, and where the hidden state of the row begins. hidden: None for no head."""

    hidden: tl.tensor
    begin: tl.tensor
    weight: tl.tensor
    weight_stride: tl.tensor
    bias: tl.tensor
    width: tl.tensor
    softcap: tl.tensor
    logit_scale: tl.tensor


@triton.jit
def vocabulary_sums(chunk_sums, chunks, CHUNKS: tl.constexpr, ENTROPY: tl.constexpr):
    """The sums of the row whose chunks begin here."""
    # All loads before the first reduction: in another order ptxas spills for 64 slots.
    maxima = load_chunks(chunk_sums, chunks, MAXIMUM, -float("inf"), CHUNKS)
    masses = load_chunks(chunk_sums, chunks, MASS, 0.0, CHUNKS)
    bad = tl.max(load_chunks(chunk_sums, chunks, BAD, 0.0, CHUNKS), axis=0) > 0.0
    top, d = below_top(maxima)
    factor = tl.exp(d)
    mass = tl.sum(factor * masses, axis=0)
    weighted = mass * 0.0
    if ENTROPY:
        t = load_chunks(chunk_sums, chunks, WEIGHTED, 0.0, CHUNKS)
        weighted = tl.sum(factor * (t + masses * d), axis=0)
    return Sums(top, mass, weighted, bad)


@triton.jit
def top_candidates(row, K: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr):
    """Keys of the first K tokens of a vocabulary row, descending; NOTHING where there are fewer.

    A token among the first K lies in one of the first K tiles by (maximum, position): fewer than K
    tiles have a token before it.
    """
    tile = tl.arange(0, TILES)
    maxima = tl.load(row.tile_max + tile, mask=tile < row.tiles, other=-float("inf"))
    tile_keys = tl.where(maxima > -float("inf"), key_of(maxima, tile), NOTHING)
    if TILES > K:
        tile_keys = tl.topk(tile_keys, K)
        best = tl.where(tile_keys != NOTHING, token_of(tile_keys), row.tiles)
    else:
        best = tl.arange(0, K)
    token = best[:, None] * TILE + tl.arange(0, TILE)[None, :]
    z = tl.load(row.logits + token, mask=token < row.vocabulary, other=-float("inf"))
    z = z.to(tl.float32)
    keys = tl.where(z > -float("inf"), key_of(z, token), NOTHING)
    return tl.topk(tl.reshape(keys, [K * TILE]), K)


@triton.jit
def head_logits(
    token, live, head,
    K: tl.constexpr, BLOCK_H: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """fp32 logits of the candidates from the last hidden state."""
    start = token.to(tl.int64) * head.weight_stride
    # One reduction, behind the loop: each takes as long as a round of loads.
    total = tl.zeros([K, BLOCK_H], tl.float32)
    for begin in range(0, head.width, BLOCK_H):
        h = begin + tl.arange(0, BLOCK_H)
        x = tl.load(head.hidden + head.begin + h, mask=h < head.width, other=0.0).to(tl.float32)
        w = tl.load(
            head.weight + start[:, None] + h[None, :],
            mask=live[:, None] & (h < head.width)[None, :],
            other=0.0,
        ).to(tl.float32)
        total += w * x[None, :]
    z = tl.sum(total, axis=1)
    if head.bias is not None:
        z += tl.load(head.bias + token, mask=live, other=0.0).to(tl.float32)
    return scaled_and_capped(z, head.logit_scale, head.softcap, SOFTCAP)


@triton.jit
def cut(a, live, slot, soft, mass, row, JOINT: tl.constexpr):
    """(log p, slots in use, mass of what is kept in units of the first) of a descending row after
    top-p, min-p and eps.

    Masses are added up in fp64; exponentials are fp32, so that a prefix within 1e-6 of top_p may
    fall on either side of it.
    """
    top_p, min_p = float_of(row, TOP_P), float_of(row, MIN_P)
    eps = tl.where(soft, float_of(row, EPS), 0.0)
    best = tl.max(tl.where(live, a, -float("inf")), axis=0)
    ratio = tl.where(live, tl.exp(a - best), 0.0)
    before = tl.cumsum(ratio.to(tl.float64), axis=0) - ratio.to(tl.float64)
    share = tl.sum(ratio.to(tl.float64), axis=0)
    if JOINT:
        share = mass.to(tl.float64)
    kept = before / share < tl.where(top_p >= 1.0, float("inf"), top_p)
    kept = live & ((kept & (ratio >= min_p)) | (slot == 0))
    kept_mass = tl.sum(tl.where(kept, ratio, 0.0), axis=0)
    logp = a - best - tl.log(kept_mass)
    used = kept
    if eps > 0.0:
        used = live
        logp = tl.log(tl.where(kept, tl.exp(logp), 0.0) + eps)
    return tl.where(used, logp, 0.0), used, kept_mass


@triton.jit
def draw_listed(z, token, live, slot, soft, mass, row, JOINT: tl.constexpr):
    """(token, g', log p) of every slot in the order of g', behind a token that was drawn itself,
    from the candidates and their logits: -1 and -inf in slots that are not used. And (a of the
    first candidate, mass of what is kept in its units)."""
    a = tl.div_rn(z, float_of(row, TEMPERATURE))
    a, token, live = sorted_candidates(a, token, live)
    best = tl.max(tl.where(live, a, -float("inf")), axis=0)
    logp, used, kept_mass = cut(a, live, slot, soft, mass, row, JOINT)
    g, first = perturb(logp, token, used, soft, row)
    g_of_first = tl.sum(tl.where(first, g, 0.0), axis=0)
    g, moved_token, used = sorted_candidates(tl.where(first, float("inf"), g), token, used)
    g = tl.where(g == float("inf"), g_of_first, g)
    moved_token = tl.where(used, moved_token, -1)
    # Every token is there once: the sum has one term.
    moved = tl.where(moved_token[:, None] == token[None, :], logp[None, :], 0.0)
    logp = tl.where(used, tl.sum(moved, axis=1), -float("inf"))
    return moved_token, tl.where(used, g, -float("inf")), logp, best, kept_mass


@triton.jit
def refined_mass(z, key, live, top, row):
    """What logits of the candidates from the head add to a row's mass, in units of exp(top)."""
    temperature = float_of(row, TEMPERATURE)
    change = tl.exp(tl.div_rn(z, temperature) - top)
    change -= tl.exp(tl.div_rn(value_of(key), temperature) - top)
    return tl.sum(tl.where(live, change, 0.0), axis=0)


@triton.jit
def draw_from_slots(
    key, slot, row, head, sums,
    K: tl.constexpr, BLOCK_H: tl.constexpr, SOFTCAP: tl.constexpr, JOINT: tl.constexpr,
):  # fmt: skip
    """(token, g', log p) of every slot of a listed row from the keys of its first candidates; and
    the share of the row's mass that is kept."""
    soft = int_of(row, MODE) == SOFT
    live = (slot < int_of(row, TOP_K)) & (key != NOTHING)
    z, whole = value_of(key), sums.mass
    if head.hidden is not None:
        z = head_logits(token_of(key), live, head, K, BLOCK_H, SOFTCAP)
        whole += refined_mass(z, key, live, sums.top, row)
    token, gprime, logp, first_a, kept = draw_listed(
        z, token_of(key), live, slot, soft, sums.mass, row, JOINT
    )
    kept *= tl.exp(first_a - sums.top)
    return token, gprime, logp, kept / tl.maximum(whole, kept)


@triton.jit
def is_terminal(token, terminal_ids, width, TERMINALS: tl.constexpr):
    """Whether the token is among the first TERMINALS of the row that begins here."""
    found = token < -1
    for i in tl.static_range(TERMINALS):
        found = found | (tl.load(terminal_ids + i, mask=i < width, other=-1) == token)
    return found


@triton.jit
def mixture_weights(gprime, token, tau, reach):
    """softmax(g' / tau) of the slots within reach: fp64 and one rounding, as `weights_within`, the
    trainer's to the bit."""
    power = tl.div_rn(gprime, tau).to(tl.float64)
    power = tl.exp(power - tl.max(power, axis=0))
    below = tl.max(gprime, axis=0).to(tl.float64) - gprime.to(tl.float64)
    power = tl.where((token >= 0) & (below <= reach), power, 0.0)
    return (power / tl.sum(power, axis=0)).to(tl.float32)
