"""From log-probabilities of candidates to g', as device functions: the noise of every method."""

from __future__ import annotations

import triton
import triton.language as tl

from softgrpo_kernels import methods
from softgrpo_kernels.gpu.noise import gumbel, log_gamma, normal, portable_log
from softgrpo_kernels.gpu.soft_token.keys import NOTHING, key_of
from softgrpo_kernels.gpu.soft_token.row import (
    CLAMP_HIGH,
    CLAMP_LOW,
    NOISE,
    NOISE_SCALE,
    float_of,
    int_of,
    noise_key,
)
from softgrpo_kernels.methods import dirichlet, gaussian, multiplex_weighted

NONE, DIRICHLET = tl.constexpr(methods.NONE), tl.constexpr(methods.DIRICHLET)
GAUSSIAN, MULTIPLEX = tl.constexpr(methods.GAUSSIAN), tl.constexpr(methods.MULTIPLEX)
MULTIPLEX_WEIGHTED = tl.constexpr(methods.MULTIPLEX_WEIGHTED)
MIXTURE_OF_INPUTS = tl.constexpr(methods.MIXTURE_OF_INPUTS)
MIN_SHAPE = tl.constexpr(dirichlet.MIN_SHAPE)
MIN_WEIGHT = tl.constexpr(gaussian.MIN_WEIGHT)
MIN_LOG_WEIGHT = tl.constexpr(multiplex_weighted.MIN_LOG_WEIGHT)
COUNT_SIZE = tl.constexpr(1 << multiplex_weighted.COUNT_BITS)


@triton.jit
def perturb(logp, token, used, soft, row):
    """g' of every slot, and which comes first; meaning: `softgrpo_kernels.reference.perturb`."""
    noise, scale, key = int_of(row, NOISE), float_of(row, NOISE_SCALE), noise_key(row)
    value = logp
    if (soft == 0) | (noise != NONE):
        g = gumbel(token, key)
        low, high = float_of(row, CLAMP_LOW), float_of(row, CLAMP_HIGH)
        clamped = scale * tl.minimum(tl.maximum(g, low), high)
        value = logp + tl.where(soft, clamped, g)
    if soft & (noise == DIRICHLET):
        value = _dirichlet(logp, token, used, scale, key)
    if soft & (noise == GAUSSIAN):
        value = _gaussian(logp, token, scale, key)
    first = used & (token < 0)  # none
    if soft & (noise >= MULTIPLEX):
        draws = tl.where(noise <= MULTIPLEX_WEIGHTED, scale, 1.0)
        count, first = _draws(logp, token, used, draws.to(tl.int32), key)
        if noise == MULTIPLEX:
            share = tl.div_rn(tl.maximum(count, 1.0), count * 0.0 + draws)
            value = tl.where(count > 0.0, portable_log(share), -float("inf"))
        elif noise == MULTIPLEX_WEIGHTED:
            value = tl.where(count > 0.0, _weighted(logp, count), -float("inf"))
        elif noise == MIXTURE_OF_INPUTS:
            value = _mixture_of_inputs(logp, used, first, scale)
        else:
            value = logp
    return tl.where(used, value, -float("inf")), first


@triton.jit
def _dirichlet(logp, token, used, scale, key):
    shape = tl.where(used, tl.maximum(scale * tl.exp(logp), MIN_SHAPE), 1.0)
    log_g = log_gamma(token, shape, key)
    top = tl.max(tl.where(used, log_g, -float("inf")), axis=0)
    mass = tl.sum(tl.where(used, tl.exp(log_g - top), 0.0), axis=0)
    return log_g - top - tl.log(mass)


@triton.jit
def _gaussian(logp, token, scale, key):
    noisy = scale * normal(token, key)
    # fp64: where p + noise nearly cancels, their logarithm shows every bit.
    x = tl.exp(logp.to(tl.float64)) + noisy.to(tl.float64)
    return tl.log(tl.maximum(x, MIN_WEIGHT)).to(tl.float32)


@triton.jit
def _draws(logp, token, used, draws, key):
    """(how often every slot was drawn from p, which was first)."""
    count, first = logp * 0.0, used & (token < 0)
    for draw in range(draws):
        order = tl.where(used, key_of(logp + gumbel(token, key, draw), token), NOTHING)
        won = used & (order == tl.max(order, axis=0))
        count += won.to(tl.float32)
        first = first | (won & (draw == 0))
    return count, first


@triton.jit
def _weighted(logp, count):
    """log(count p), count - 1 in its low bits."""
    count = tl.maximum(count, 1.0)
    value = logp + portable_log(count)
    value = tl.where(tl.abs(value) < MIN_LOG_WEIGHT, MIN_LOG_WEIGHT, value)
    low = count.to(tl.int32) - 1
    word = value.to(tl.int32, bitcast=True) - low + COUNT_SIZE // 2
    return ((word & -COUNT_SIZE) | low).to(tl.float32, bitcast=True)


@triton.jit
def _mixture_of_inputs(logp, used, drawn, beta):
    """fp64, as the reference: of a confident p the entropy is a small difference."""
    best = tl.max(tl.where(used, logp, -float("inf")), axis=0)
    below = tl.where(used, best - logp, 0.0).to(tl.float64)
    ratio = tl.where(used, tl.exp(-below), 0.0)
    total = tl.sum(ratio, axis=0)
    entropy = tl.log(total) + tl.sum(ratio * below, axis=0) / total
    n = tl.sum(used.to(tl.int32), axis=0)
    uncertainty = tl.minimum(entropy / tl.log(tl.maximum(n, 2).to(tl.float64)), 1.0)
    share = uncertainty / (1.0 + beta.to(tl.float64))
    log_p = -below - tl.log(total)
    token = share * (tl.exp(log_p) + beta) + (1.0 - uncertainty)
    return tl.where(drawn, tl.log(token), tl.log(share) + log_p).to(tl.float32)
