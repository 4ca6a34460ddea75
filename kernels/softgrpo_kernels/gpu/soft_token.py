"""Stage 2 of the soft step, and the step as a whole, in Triton.

Meaning: `softgrpo_kernels.reference.soft_token`. The statistics kernel reads the logits once, the
selection its K best tiles again, from the cache; a third kernel draws, a fourth mixes the
embeddings. Nothing waits for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softgrpo_kernels.gpu.candidates import (
    NOTHING,
    cut,
    head_logits,
    key_of,
    perturb,
    token_of,
    top_candidates,
    value_of,
)
from softgrpo_kernels.gpu.full_vocabulary import sample_full_vocabulary
from softgrpo_kernels.gpu.lm_head import MOST_ROWS, lm_head_statistics
from softgrpo_kernels.gpu.row_rules import row_is_sound
from softgrpo_kernels.gpu.soft_embedding import mix_into, unit_stride
from softgrpo_kernels.gpu.statistics import TILE, vocabulary_statistics
from softgrpo_kernels.row_rules import DISCRETE, GREEDY, SKIP, SOFT
from softgrpo_kernels.rows import RowParameters
from softgrpo_kernels.step import LMHead, SoftToken

_GREEDY, _DISCRETE = tl.constexpr(GREEDY), tl.constexpr(DISCRETE)
_SOFT, _SKIP = tl.constexpr(SOFT), tl.constexpr(SKIP)


@triton.jit
def _vocabulary_sums(chunk_sums, chunks, CHUNKS: tl.constexpr, ENTROPY: tl.constexpr):
    """(maximum, mass, sum of exp(d) d, whether a logit is NaN or +inf) of the row."""
    chunk = tl.arange(0, CHUNKS)
    inside = chunk < chunks
    m = tl.load(chunk_sums + chunk * 4, mask=inside, other=-float("inf"))
    s = tl.load(chunk_sums + chunk * 4 + 1, mask=inside, other=0.0)
    bad = tl.max(tl.load(chunk_sums + chunk * 4 + 3, mask=inside, other=0.0), axis=0) > 0.0
    top = tl.max(m, axis=0)
    d = tl.where(m > -float("inf"), m - top, -1000.0)
    factor = tl.exp(d)
    mass = tl.sum(factor * s, axis=0)
    weighted = mass * 0.0
    if ENTROPY:
        t = tl.load(chunk_sums + chunk * 4 + 2, mask=inside, other=0.0)
        weighted = tl.sum(factor * (t + s * d), axis=0)
    return top, mass, weighted, bad


@triton.jit(do_not_specialize=["tiles", "batch", "k_max"])
def select_kernel(
    out_keys, logits, stride, vocabulary, tile_max, tiles, ints, batch, k_max,
    K: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program b: the keys of the first K tokens of row b, where anybody asks for them."""
    row = tl.program_id(0).to(tl.int64)
    top_k, mode = tl.load(ints + row), tl.load(ints + 5 * batch + row)
    listed = ((mode == _DISCRETE) | (mode == _SOFT)) & (top_k >= 1) & (top_k <= k_max)
    if listed | (mode == _GREEDY):
        keys = top_candidates(
            logits + row * stride, tile_max + row * tiles, vocabulary, tiles, K, TILES, TILE
        )
        tl.store(out_keys + row * K + tl.arange(0, K), keys)


@triton.jit(do_not_specialize=["chunks", "batch", "terminal_width", "k_max"])
def draw_kernel(
    keys, chunk_sums, chunks, floats, ints, batch, terminal_ids, terminal_width, hidden,
    hidden_stride, weight, weight_stride, bias, width, softcap, logit_scale, out_ids, out_gprime,
    out_weights, out_logp, out_n, out_token, out_token_logp, out_kind, out_lse, out_entropy,
    out_valid, k_max,
    K: tl.constexpr, CHUNKS: tl.constexpr, TERMINALS: tl.constexpr, HEAD: tl.constexpr,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, JOINT: tl.constexpr, LSE: tl.constexpr,
    ENTROPY: tl.constexpr,
):  # fmt: skip
    """Program b: everything of row b that follows from its candidates. Rows of
    `RowParameters.unlisted` are left as padding."""
    row = tl.program_id(0).to(tl.int64)
    top_k, mode = tl.load(ints + row), tl.load(ints + 5 * batch + row)
    slot = tl.arange(0, K)
    value, token = tl.full([K], -float("inf"), tl.float32), tl.full([K], -1, tl.int32)
    logp, weights = value, tl.zeros([K], tl.float32)
    lse, entropy = float("nan"), float("nan")
    valid, soft = mode == _SKIP, mode == _SOFT
    if mode != _SKIP:
        top, mass, weighted, bad = _vocabulary_sums(
            chunk_sums + row * chunks * 4, chunks, CHUNKS, ENTROPY
        )
        valid = (bad == 0) & (top > -float("inf"))
        valid = valid & row_is_sound(floats, ints, batch, row, k_max)
        log_mass = tl.log(mass)
        lse = tl.where(valid, top + log_mass, lse)
        entropy = tl.where(valid, log_mass - weighted / mass, entropy)
        if valid & (mode == _GREEDY):
            token = tl.where(slot == 0, token_of(tl.load(keys + row * K + slot)), -1)
            logp = tl.where(slot == 0, 0.0 - log_mass, -float("inf"))
            value = logp
        listed = ((mode == _DISCRETE) | soft) & (top_k >= 1) & (top_k <= k_max)
        if valid & listed:
            key = tl.load(keys + row * K + slot)
            live = (slot < top_k) & (key != NOTHING)
            z = value_of(key)
            if HEAD:
                z = head_logits(
                    token_of(key), live, hidden + row * hidden_stride, weight, bias,
                    weight_stride, width, softcap, logit_scale, K, 64, BIAS, SOFTCAP,
                )  # fmt: skip
            a = tl.div_rn(z, tl.load(floats + row))
            key = tl.sort(tl.where(live, key_of(a, token_of(key)), NOTHING), descending=True)
            token, a, live = token_of(key), value_of(key), key != NOTHING
            eps = tl.where(soft, tl.load(floats + 7 * batch + row), 0.0)
            top_p, min_p = tl.load(floats + batch + row), tl.load(floats + 2 * batch + row)
            exact, used = cut(a, live, slot, top_p, min_p, eps, mass, JOINT)
            g = perturb(
                exact, token, used, soft, tl.load(ints + 6 * batch + row),
                tl.load(floats + 4 * batch + row), tl.load(floats + 5 * batch + row),
                tl.load(floats + 6 * batch + row), tl.load(ints + batch + row),
                tl.load(ints + 2 * batch + row), tl.load(ints + 3 * batch + row),
                tl.load(ints + 4 * batch + row),
            )  # fmt: skip
            used = g > -float("inf")
            key = tl.sort(tl.where(used, key_of(g, token), NOTHING), descending=True)
            used = key != NOTHING
            new_token = tl.where(used, token_of(key), -1)
            value = tl.where(used, value_of(key), -float("inf"))
            moved = tl.where(new_token[:, None] == token[None, :], exact[None, :], 0.0)
            logp = tl.where(used, tl.sum(moved, axis=1), -float("inf"))
            token = new_token

    n = tl.sum((token >= 0).to(tl.int32), axis=0)
    first = tl.sum(tl.where(slot == 0, token, 0), axis=0)
    soft = soft & (n > 0)
    for i in tl.static_range(TERMINALS):
        end = tl.load(terminal_ids + row * terminal_width + i, mask=i < terminal_width, other=-1)
        soft = soft & (end != first)
    if soft:
        # fp64 and one rounding, as `soft_weights`: the trainer's weights to the bit.
        power = tl.div_rn(value, tl.load(floats + 3 * batch + row)).to(tl.float64)
        power = tl.exp(power - tl.max(power, axis=0))
        power = tl.where(token >= 0, power, 0.0)
        weights = (power / tl.sum(power, axis=0)).to(tl.float32)
    elif n > 0:
        weights = tl.where(slot == 0, 1.0, 0.0)

    at, inside = row * k_max + slot, slot < k_max
    tl.store(out_ids + at, token, mask=inside)
    tl.store(out_gprime + at, value, mask=inside)
    tl.store(out_weights + at, weights, mask=inside)
    tl.store(out_logp + at, logp, mask=inside)
    tl.store(out_n + row, n)
    tl.store(out_token + row, tl.where(n > 0, first, -1))
    tl.store(out_token_logp + row, tl.max(tl.where(slot == 0, logp, -float("inf")), axis=0))
    tl.store(out_kind + row, soft.to(tl.uint8))
    tl.store(out_valid + row, valid.to(tl.uint8))
    if LSE:
        tl.store(out_lse + row, lse)
    if ENTROPY:
        tl.store(out_entropy + row, entropy)


def soft_token(
    logits: Tensor | None,
    embed: Tensor | None,
    rows: RowParameters,
    out: SoftToken,
    *,
    terminal_ids: Tensor | None = None,
    head: LMHead | None = None,
    joint: bool = False,
) -> None:
    """Fills `out`; arguments as in the reference, float32, bfloat16 or float16. Without logits
    they are computed from the head."""
    batch, need_entropy = len(out.token), out.entropy is not None
    if not batch:
        return
    if logits is None and batch <= MOST_ROWS:
        assert head is not None
        logits, tile_max, chunk_sums = lm_head_statistics(head, rows, need_entropy=need_entropy)
    else:
        if logits is None:
            assert head is not None
            logits = head.logits()
        logits = unit_stride(logits)
        tile_max, chunk_sums = vocabulary_statistics(logits, rows, need_entropy=need_entropy)
    _sample_from_statistics(
        logits, tile_max, chunk_sums, embed, rows, out, terminal_ids, head, joint
    )


def _sample_from_statistics(
    logits: Tensor,
    tile_max: Tensor,
    chunk_sums: Tensor,
    embed: Tensor | None,
    rows: RowParameters,
    out: SoftToken,
    terminal_ids: Tensor | None,
    head: LMHead | None,
    joint: bool,
) -> None:
    """What follows stage 1; its results as `vocabulary_statistics` returns them."""
    batch, vocabulary = logits.shape
    tiles, chunks = tile_max.shape[1], chunk_sums.shape[1]
    ends = 0 if terminal_ids is None else terminal_ids.shape[1]
    if terminal_ids is not None:
        terminal_ids = terminal_ids.to(torch.int32).contiguous()
    hidden = weight = bias = None
    if head is not None:
        hidden, weight = unit_stride(head.hidden), unit_stride(head.weight)
        bias = None if head.bias is None else head.bias.contiguous()
    k = triton.next_power_of_2(max(rows.k_max, 2))
    keys = torch.empty((batch, k), dtype=torch.int64, device=logits.device)
    select_kernel[(batch,)](
        keys, logits, logits.stride(0), vocabulary, tile_max, tiles, rows.ints, batch, rows.k_max,
        K=k, TILES=max(triton.next_power_of_2(tiles), k), TILE=TILE,
        num_warps=4 if k <= 16 else 8,
    )  # fmt: skip
    draw_kernel[(batch,)](
        keys, chunk_sums, chunks, rows.floats, rows.ints, batch, terminal_ids, ends,
        hidden, 0 if hidden is None else hidden.stride(0),
        weight, 0 if weight is None else weight.stride(0), bias,
        0 if weight is None else weight.shape[1],
        float((head and head.softcap) or 0.0), float(head.logit_scale if head else 1.0),
        out.ids, out.gprime, out.weights, out.logp, out.n, out.token, out.token_logp, out.kind,
        out.lse, out.entropy, out.valid.view(torch.uint8), rows.k_max,
        K=k, CHUNKS=triton.next_power_of_2(chunks), TERMINALS=ends, HEAD=head is not None,
        BIAS=bias is not None, SOFTCAP=head is not None and head.softcap is not None, JOINT=joint,
        LSE=out.lse is not None, ENTROPY=out.entropy is not None,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    sample_full_vocabulary(logits, rows, out, chunk_sums, joint=joint)
    if embed is not None and out.embed is not None:
        mix_into(out.embed, out.ids, out.weights, embed)
