"""Stage 3 of the soft step: from the first candidates of a row to its soft token."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from softgrpo_kernels.gpu.soft_token.keys import NOTHING, sorted_candidates, token_of, value_of
from softgrpo_kernels.gpu.soft_token.perturb import perturb
from softgrpo_kernels.gpu.soft_token.row import (
    EPS,
    GREEDY,
    MIN_P,
    MODE,
    REACH,
    SKIP,
    SOFT,
    TAU,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    Row,
    float_of,
    int_of,
    is_listed,
)
from softgrpo_kernels.gpu.soft_token.row_rules import row_is_sound
from softgrpo_kernels.gpu.soft_token.statistics import (
    BAD,
    COLUMNS,
    MASS,
    MAXIMUM,
    WEIGHTED,
    below_top,
    load_chunks,
)
from softgrpo_kernels.gpu.softcap import scaled_and_capped
from softgrpo_kernels.lm_head import LMHead
from softgrpo_kernels.row_parameters import RowParameters
from softgrpo_kernels.soft_token_tensors import SoftToken
from softgrpo_kernels.tensors import int32, unit_stride


class Head(NamedTuple):
    """The LM head, and the hidden state of the row."""

    hidden: tl.tensor
    weight: tl.tensor
    weight_stride: tl.tensor
    bias: tl.tensor
    width: tl.tensor
    softcap: tl.tensor
    logit_scale: tl.tensor


@triton.jit
def vocabulary_sums(chunk_sums, chunks, CHUNKS: tl.constexpr, ENTROPY: tl.constexpr):
    """(maximum, mass, sum of exp(d) d, whether a logit is NaN or +inf) of the row."""
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
    return top, mass, weighted, bad


@triton.jit
def head_logits(
    token, live, head,
    K: tl.constexpr, BLOCK_H: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """fp32 logits of the candidates from the last hidden state."""
    start = token.to(tl.int64) * head.weight_stride
    total = tl.zeros([K], tl.float32)
    for begin in range(0, head.width, BLOCK_H):
        h = begin + tl.arange(0, BLOCK_H)
        x = tl.load(head.hidden + h, mask=h < head.width, other=0.0).to(tl.float32)
        w = tl.load(
            head.weight + start[:, None] + h[None, :],
            mask=live[:, None] & (h < head.width)[None, :],
            other=0.0,
        ).to(tl.float32)
        total += tl.sum(w * x[None, :], axis=1)
    if BIAS:
        total += tl.load(head.bias + token, mask=live, other=0.0).to(tl.float32)
    return scaled_and_capped(total, head.logit_scale, head.softcap, SOFTCAP)


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


@triton.jit(do_not_specialize=["chunks", "batch", "terminal_width", "k_max"])
def draw_kernel(
    keys, chunk_sums, chunks, floats, ints, batch, terminal_ids, terminal_width, hidden,
    hidden_stride, weight, weight_stride, bias, width, softcap, logit_scale, out_ids, out_gprime,
    out_weights, out_logp, out_n, out_token, out_token_logp, out_kind, out_lse, out_entropy,
    out_kept_mass, out_valid, k_max,
    K: tl.constexpr, CHUNKS: tl.constexpr, TERMINALS: tl.constexpr, HEAD: tl.constexpr,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, JOINT: tl.constexpr, LSE: tl.constexpr,
    ENTROPY: tl.constexpr, KEPT_MASS: tl.constexpr,
):  # fmt: skip
    """Program b: everything of row b that follows from its candidates. Rows of
    `RowParameters.unlisted` are left as padding."""
    index = tl.program_id(0).to(tl.int64)
    row = Row(floats, ints, batch, index, k_max)
    mode = int_of(row, MODE)
    valid, soft = mode == SKIP, mode == SOFT
    slot = tl.arange(0, K)
    token, gprime = tl.full([K], -1, tl.int32), tl.full([K], -float("inf"), tl.float32)
    logp, weights = gprime, tl.zeros([K], tl.float32)
    lse, entropy, kept_mass = float("nan"), float("nan"), float("nan")
    if mode != SKIP:
        top, mass, weighted, bad = vocabulary_sums(
            chunk_sums + index * chunks * COLUMNS, chunks, CHUNKS, ENTROPY
        )
        valid = (bad == 0) & (top > -float("inf")) & row_is_sound(row)
        log_mass = tl.log(mass)
        lse = tl.where(valid, top + log_mass, lse)
        entropy = tl.where(valid, log_mass - weighted / mass, entropy)
        if valid & (mode == GREEDY):
            token = tl.where(slot == 0, token_of(tl.load(keys + index * K + slot)), -1)
            logp = tl.where(slot == 0, 0.0 - log_mass, -float("inf"))
            gprime = logp
            kept_mass = 1.0
        if valid & is_listed(row):
            key = tl.load(keys + index * K + slot)
            live = (slot < int_of(row, TOP_K)) & (key != NOTHING)
            z = value_of(key)
            if HEAD:
                head = Head(
                    hidden + index * hidden_stride, weight, weight_stride, bias, width, softcap,
                    logit_scale,
                )  # fmt: skip
                z = head_logits(token_of(key), live, head, K, 64, BIAS, SOFTCAP)
            token, gprime, logp, best, kept = draw_listed(
                z, token_of(key), live, slot, soft, mass, row, JOINT
            )
            if KEPT_MASS:
                whole = mass
                if HEAD:
                    whole += refined_mass(z, key, live, top, row)
                kept *= tl.exp(best - top)
                kept_mass = kept / tl.maximum(whole, kept)

    n = tl.sum((token >= 0).to(tl.int32), axis=0)
    first = tl.sum(tl.where(slot == 0, token, 0), axis=0)
    soft = soft & (n > 0)
    if TERMINALS > 0:
        ends = terminal_ids + index * terminal_width
        soft = soft & (is_terminal(first, ends, terminal_width, TERMINALS) == 0)
    if soft:
        weights = mixture_weights(gprime, token, float_of(row, TAU), float_of(row, REACH))
    elif n > 0:
        weights = tl.where(slot == 0, 1.0, 0.0)

    at, inside = index * k_max + slot, slot < k_max
    tl.store(out_ids + at, token, mask=inside)
    tl.store(out_gprime + at, gprime, mask=inside)
    tl.store(out_weights + at, weights, mask=inside)
    tl.store(out_logp + at, logp, mask=inside)
    tl.store(out_n + index, n)
    tl.store(out_token + index, tl.where(n > 0, first, -1))
    tl.store(out_token_logp + index, tl.max(tl.where(slot == 0, logp, -float("inf")), axis=0))
    tl.store(out_kind + index, soft.to(tl.uint8))
    tl.store(out_valid + index, valid.to(tl.uint8))
    if LSE:
        tl.store(out_lse + index, lse)
    if ENTROPY:
        tl.store(out_entropy + index, entropy)
    if KEPT_MASS:
        tl.store(out_kept_mass + index, tl.where(soft, float("nan"), kept_mass))


def draw(
    keys: Tensor,
    chunk_sums: Tensor,
    rows: RowParameters,
    out: SoftToken,
    terminal_ids: Tensor | None,
    head: LMHead | None,
    joint: bool,
) -> None:
    """Fills `out`, but for its embed.

    keys: as `select` returns them; chunk_sums: as `vocabulary_statistics` does.
    """
    (batch, k), chunks = keys.shape, chunk_sums.shape[1]
    ends = 0 if terminal_ids is None else terminal_ids.shape[1]
    terminal_ids = None if terminal_ids is None else int32(terminal_ids)
    hidden = weight = bias = None
    if head is not None:
        hidden, weight = unit_stride(head.hidden), unit_stride(head.weight)
        bias = None if head.bias is None else head.bias.contiguous()
    draw_kernel[(batch,)](
        keys, chunk_sums, chunks, rows.floats, rows.ints, batch, terminal_ids, ends,
        hidden, 0 if hidden is None else hidden.stride(0),
        weight, 0 if weight is None else weight.stride(0), bias,
        0 if weight is None else weight.shape[1],
        float((head and head.softcap) or 0.0), float(head.logit_scale if head else 1.0),
        out.ids, out.gprime, out.weights, out.logp, out.n, out.token, out.token_logp, out.kind,
        out.lse, out.entropy, out.kept_mass, out.valid.view(torch.uint8), rows.k_max,
        K=k, CHUNKS=triton.next_power_of_2(chunks), TERMINALS=ends, HEAD=head is not None,
        BIAS=bias is not None, SOFTCAP=head is not None and head.softcap is not None, JOINT=joint,
        LSE=out.lse is not None, ENTROPY=out.entropy is not None,
        KEPT_MASS=out.kept_mass is not None,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
