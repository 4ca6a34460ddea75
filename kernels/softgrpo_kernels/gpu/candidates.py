"""Device functions of stage 2: keys that order candidates, their selection, noise and cut."""

from __future__ import annotations

import triton
import triton.language as tl

from softgrpo_kernels.gpu.noise import gumbel, log_gamma, normal
from softgrpo_kernels.methods import DIRICHLET, GAUSSIAN, MULTIPLEX, NONE
from softgrpo_kernels.methods.dirichlet import MIN_SHAPE
from softgrpo_kernels.methods.gaussian import MIN_WEIGHT

NOTHING = tl.constexpr(-(2**63))
_NONE, _DIRICHLET = tl.constexpr(NONE), tl.constexpr(DIRICHLET)
_GAUSSIAN, _MULTIPLEX = tl.constexpr(GAUSSIAN), tl.constexpr(MULTIPLEX)
_MIN_SHAPE, _MIN_WEIGHT = tl.constexpr(MIN_SHAPE), tl.constexpr(MIN_WEIGHT)


@triton.jit
def key_of(value, token):
    """int64 keys in the order of candidates: value descending, id ascending is key descending."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)  # -0 is 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (2147483647 - token).to(tl.int64)


@triton.jit
def value_of(key):
    """The fp32 value of a key."""
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def token_of(key):
    """The token id of a key."""
    return 2147483647 - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def top_candidates(
    logits, tile_max, vocabulary, tiles,
    K: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Keys of the first K tokens of a row, descending; NOTHING where there are fewer.

    A token among the first K lies in one of the first K tiles by (maximum, position): fewer than K
    tiles have a token before it.
    """
    tile = tl.arange(0, TILES)
    maxima = tl.load(tile_max + tile, mask=tile < tiles, other=-float("inf"))
    tile_keys = tl.where(maxima > -float("inf"), key_of(maxima, tile), NOTHING)
    if TILES > K:
        tile_keys = tl.topk(tile_keys, K)
        best = tl.where(tile_keys != NOTHING, token_of(tile_keys), tiles)
    else:
        best = tl.arange(0, K)
    token = best[:, None] * TILE + tl.arange(0, TILE)[None, :]
    z = tl.load(logits + token, mask=token < vocabulary, other=-float("inf")).to(tl.float32)
    keys = tl.where(z > -float("inf"), key_of(z, token), NOTHING)
    return tl.topk(tl.reshape(keys, [K * TILE]), K)


@triton.jit
def head_logits(
    token, live, hidden, weight, bias, weight_stride, width, softcap, logit_scale,
    K: tl.constexpr, BLOCK_H: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """fp32 logits of the candidates from the last hidden state."""
    start = token.to(tl.int64) * weight_stride
    total = tl.zeros([K], tl.float32)
    for begin in range(0, width, BLOCK_H):
        h = begin + tl.arange(0, BLOCK_H)
        x = tl.load(hidden + h, mask=h < width, other=0.0).to(tl.float32)
        w = tl.load(
            weight + start[:, None] + h[None, :],
            mask=live[:, None] & (h < width)[None, :],
            other=0.0,
        ).to(tl.float32)
        total += tl.sum(w * x[None, :], axis=1)
    if BIAS:
        total += tl.load(bias + token, mask=live, other=0.0).to(tl.float32)
    total = total * logit_scale
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        total = softcap * (1.0 - 2.0 / (tl.exp(2.0 * total / softcap) + 1.0))
    return total


@triton.jit
def cut(a, live, slot, top_p, min_p, eps, mass, JOINT: tl.constexpr):
    """(log p, slots in use) of a descending row after top-p, min-p and eps.

    Masses are added up in fp64; exponentials are fp32, so that a prefix within 1e-6 of top_p may
    fall on either side of it.
    """
    best = tl.max(tl.where(live, a, -float("inf")), axis=0)
    ratio = tl.where(live, tl.exp(a - best), 0.0)
    before = tl.cumsum(ratio.to(tl.float64), axis=0) - ratio.to(tl.float64)
    share = tl.sum(ratio.to(tl.float64), axis=0)
    if JOINT:
        share = mass.to(tl.float64)
    kept = before / share < tl.where(top_p >= 1.0, float("inf"), top_p)
    kept = live & ((kept & (ratio >= min_p)) | (slot == 0))
    logp = a - best - tl.log(tl.sum(tl.where(kept, ratio, 0.0), axis=0))
    used = kept
    if eps > 0.0:
        used = live
        logp = tl.log(tl.where(kept, tl.exp(logp), 0.0) + eps)
    return tl.where(used, logp, 0.0), used


@triton.jit
def _multiplex(logp, token, used, draws, seed, position, uid, stream):
    """log(count / draws) of independent draws from p; -inf where nothing was drawn."""
    count = logp * 0.0
    for draw in range(draws):
        value = logp + gumbel(token, seed, position, uid, stream + (draw << 16))
        keys = tl.where(used, key_of(value, token), NOTHING)
        count += (keys == tl.max(keys, axis=0)).to(tl.float32)
    drawn = count > 0.0
    share = tl.div_rn(tl.where(drawn, count, 1.0), count * 0.0 + draws)
    return tl.where(drawn, tl.log(share), -float("inf"))


@triton.jit
def perturb(
    logp, token, used, soft, noise, scale, clamp_low, clamp_high, seed, position, uid, stream
):
    """g' of every slot; meaning: `softgrpo_kernels.reference.perturb`."""
    value = logp
    if (soft == 0) | (noise != _NONE):
        g = gumbel(token, seed, position, uid, stream)
        clamped = scale * tl.minimum(tl.maximum(g, clamp_low), clamp_high)
        value = logp + tl.where(soft, clamped, g)
    if soft & (noise == _DIRICHLET):
        shape = tl.where(used, tl.maximum(scale * tl.exp(logp), _MIN_SHAPE), 1.0)
        log_g = log_gamma(token, shape, seed, position, uid, stream)
        top = tl.max(tl.where(used, log_g, -float("inf")), axis=0)
        mass = tl.sum(tl.where(used, tl.exp(log_g - top), 0.0), axis=0)
        value = log_g - top - tl.log(mass)
    if soft & (noise == _GAUSSIAN):
        noisy = scale * normal(token, seed, position, uid, stream)
        # fp64: where p + noise nearly cancels, their logarithm shows every bit.
        x = tl.exp(logp.to(tl.float64)) + noisy.to(tl.float64)
        value = tl.log(tl.maximum(x, _MIN_WEIGHT)).to(tl.float32)
    if soft & (noise == _MULTIPLEX):
        value = _multiplex(logp, token, used, scale.to(tl.int32), seed, position, uid, stream)
    return tl.where(used, value, -float("inf"))
