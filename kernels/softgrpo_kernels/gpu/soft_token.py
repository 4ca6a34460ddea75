"""Stage 2 of the soft step, and the step as a whole, in Triton.

Meaning: `softgrpo_kernels.reference.soft_token`. Two kernels read the logits once between them
(stage 2 finds its K tiles in the cache); a third mixes the embeddings. Nothing waits for the
device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softgrpo_kernels.gpu.candidates import (
    NOTHING,
    head_logits,
    key_of,
    perturb,
    token_of,
    top_candidates,
    value_of,
)
from softgrpo_kernels.gpu.full_vocabulary import sample_full_vocabulary
from softgrpo_kernels.gpu.soft_embedding import mix_into
from softgrpo_kernels.gpu.statistics import CHUNK, TILE, vocabulary_statistics
from softgrpo_kernels.rows import DISCRETE, GREEDY, SKIP, SOFT, LMHead, RowParameters, SoftToken

_GREEDY, _DISCRETE = tl.constexpr(GREEDY), tl.constexpr(DISCRETE)
_SOFT, _SKIP = tl.constexpr(SOFT), tl.constexpr(SKIP)


@triton.jit
def _vocabulary_sums(chunk_sums, chunks, CHUNKS: tl.constexpr, ENTROPY: tl.constexpr):
    """(maximum, mass fp64, sum of exp(d) d fp64, whether a logit is NaN or +inf) of the row."""
    chunk = tl.arange(0, CHUNKS)
    inside = chunk < chunks
    m = tl.load(chunk_sums + chunk * 4, mask=inside, other=-float("inf"))
    s = tl.load(chunk_sums + chunk * 4 + 1, mask=inside, other=0.0).to(tl.float64)
    bad = tl.max(tl.load(chunk_sums + chunk * 4 + 3, mask=inside, other=0.0), axis=0) > 0.0
    top = tl.max(m, axis=0)
    d = tl.where(m > -float("inf"), m - top, -1000.0).to(tl.float64)
    factor = tl.exp(d)
    mass = tl.sum(factor * s, axis=0)
    weighted = mass * 0.0
    if ENTROPY:
        t = tl.load(chunk_sums + chunk * 4 + 2, mask=inside, other=0.0).to(tl.float64)
        weighted = tl.sum(factor * (t + s * d), axis=0)
    return top, mass, weighted, bad


@triton.jit
def sample_kernel(
    logits, stride, vocabulary, tile_max, tiles, chunk_sums, chunks, floats, ints, batch,
    terminal_ids, terminal_width, hidden, hidden_stride, weight, weight_stride, bias, width,
    softcap, logit_scale, out_ids, out_gprime, out_weights, out_logp, out_n, out_token,
    out_token_logp, out_kind, out_lse, out_entropy, out_valid, k_max,
    K: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr, TILE: tl.constexpr,
    TERMINALS: tl.constexpr, HEAD: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    JOINT: tl.constexpr, LSE: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """Program b: row b. Rows of `RowParameters.unlisted` are left as padding."""
    row = tl.program_id(0).to(tl.int64)
    temperature, top_p = tl.load(floats + row), tl.load(floats + batch + row)
    min_p, tau = tl.load(floats + 2 * batch + row), tl.load(floats + 3 * batch + row)
    scale, eps = tl.load(floats + 4 * batch + row), tl.load(floats + 7 * batch + row)
    clamp_low, clamp_high = tl.load(floats + 5 * batch + row), tl.load(floats + 6 * batch + row)
    top_k, seed = tl.load(ints + row), tl.load(ints + batch + row)
    position, uid = tl.load(ints + 2 * batch + row), tl.load(ints + 3 * batch + row)
    stream, mode = tl.load(ints + 4 * batch + row), tl.load(ints + 5 * batch + row)
    noise = tl.load(ints + 6 * batch + row)

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
        if LSE | ENTROPY:
            log_mass = tl.log(mass)
            lse = tl.where(valid, (top.to(tl.float64) + log_mass).to(tl.float32), lse)
            if ENTROPY:
                spread = (log_mass - weighted / mass).to(tl.float32)
                entropy = tl.where(valid, spread, entropy)
        listed = ((mode == _DISCRETE) | soft) & (top_k >= 1) & (top_k <= k_max)
        if valid & (listed | (mode == _GREEDY)):
            keys = top_candidates(
                logits + row * stride, tile_max + row * tiles, vocabulary, tiles, K, TILES, TILE
            )
            if mode == _GREEDY:
                token = tl.where(slot == 0, token_of(keys), -1)
                logp = tl.where(slot == 0, (0.0 - tl.log(mass)).to(tl.float32), -float("inf"))
                value = logp
            else:
                live = (slot < top_k) & (keys != NOTHING)
                if HEAD:
                    z = head_logits(
                        token_of(keys), live, hidden + row * hidden_stride, weight, bias,
                        weight_stride, width, softcap, logit_scale, K, 64, BIAS, SOFTCAP,
                    )  # fmt: skip
                else:
                    z = value_of(keys)
                a = tl.div_rn(z, temperature)
                keys = tl.where(live, key_of(a, token_of(keys)), NOTHING)
                keys = tl.sort(keys, descending=True)
                token, a, live = token_of(keys), value_of(keys), keys != NOTHING
                best = tl.max(tl.where(live, a, -float("inf")), axis=0)
                ratio = tl.where(live, tl.exp((a - best).to(tl.float64)), 0.0)
                before = tl.cumsum(ratio, axis=0) - ratio
                share = tl.sum(ratio, axis=0)
                if JOINT:
                    share = mass
                kept = before / share < tl.where(top_p >= 1.0, float("inf"), top_p)
                kept = live & ((kept & (ratio >= min_p)) | (slot == 0))
                exact = a.to(tl.float64) - best - tl.log(tl.sum(tl.where(kept, ratio, 0.0), axis=0))
                used = kept
                if soft & (eps > 0.0):
                    used = live
                    p = tl.where(kept, tl.exp(exact), 0.0)
                    exact = tl.log(p + eps.to(tl.float64))
                old_logp = tl.where(used, exact, 0.0).to(tl.float32)
                g = perturb(
                    old_logp, token, used, soft, noise, scale, clamp_low, clamp_high, seed,
                    position, uid, stream,
                )  # fmt: skip
                used = g > -float("inf")
                keys = tl.sort(tl.where(used, key_of(g, token), NOTHING), descending=True)
                old_token = token
                used = keys != NOTHING
                token = tl.where(used, token_of(keys), -1)
                value = tl.where(used, value_of(keys), -float("inf"))
                moved = tl.where(token[:, None] == old_token[None, :], old_logp[None, :], 0.0)
                logp = tl.where(used, tl.sum(moved, axis=1), -float("inf"))

    n = tl.sum((token >= 0).to(tl.int32), axis=0)
    first = tl.sum(tl.where(slot == 0, token, 0), axis=0)
    soft = soft & (n > 0)
    for i in tl.static_range(TERMINALS):
        end = tl.load(terminal_ids + row * terminal_width + i, mask=i < terminal_width, other=-1)
        soft = soft & (end != first)
    if soft:
        power = tl.div_rn(value, tau)
        power = tl.exp((power - tl.max(power, axis=0)).to(tl.float64))
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
    logits: Tensor,
    embed: Tensor | None,
    rows: RowParameters,
    out: SoftToken,
    *,
    terminal_ids: Tensor | None = None,
    head: LMHead | None = None,
    joint: bool = False,
) -> None:
    """Fills `out`; arguments as in the reference, float32, bfloat16 or float16."""
    if not logits.shape[0]:
        return
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    tile_max, chunk_sums = vocabulary_statistics(logits, rows, need_entropy=out.entropy is not None)
    sample_from_statistics(
        logits, tile_max, chunk_sums, embed, rows, out, terminal_ids, head, joint
    )


def sample_from_statistics(
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
        hidden, weight, bias = head.hidden, head.weight, head.bias
    k = triton.next_power_of_2(max(rows.k_max, 2))
    sample_kernel[(batch,)](
        logits, logits.stride(0), vocabulary, tile_max, tiles, chunk_sums, chunks, rows.floats,
        rows.ints, batch, terminal_ids, ends,
        hidden, 0 if hidden is None else hidden.stride(0),
        weight, 0 if weight is None else weight.stride(0), bias,
        0 if weight is None else weight.shape[1],
        (head and head.softcap) or 0.0, head.logit_scale if head else 1.0,
        out.ids, out.gprime, out.weights, out.logp, out.n, out.token, out.token_logp, out.kind,
        out.lse, out.entropy, out.valid.view(torch.uint8), rows.k_max,
        K=k, TILES=max(triton.next_power_of_2(tiles), k), CHUNKS=triton.next_power_of_2(chunks),
        TILE=TILE, TERMINALS=ends, HEAD=head is not None, BIAS=bias is not None,
        SOFTCAP=head is not None and head.softcap is not None, JOINT=joint,
        LSE=out.lse is not None, ENTROPY=out.entropy is not None,
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    assert CHUNK % TILE == 0
    sample_full_vocabulary(logits, None, rows, out, chunk_sums, joint=joint)
    if embed is not None and out.embed is not None:
        mix_into(out.embed, out.ids, out.weights, embed)
