"""From log-probabilities of candidates to g', as device functions: the noise of every method."""

from __future__ import annotations

import triton
import triton.language as tl

from softgrpo_kernels import methods
from softgrpo_kernels.gpu.noise import gumbel, log_gamma, normal
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
from softgrpo_kernels.methods import dirichlet, gaussian

NONE, DIRICHLET = tl.constexpr(methods.NONE), tl.constexpr(methods.DIRICHLET)
GAUSSIAN, MULTIPLEX = tl.constexpr(methods.GAUSSIAN), tl.constexpr(methods.MULTIPLEX)
MIN_SHAPE = tl.constexpr(dirichlet.MIN_SHAPE)
MIN_WEIGHT = tl.constexpr(gaussian.MIN_WEIGHT)


@triton.jit
def perturb(logp, token, used, soft, row):
    """g' of every slot; meaning: `softgrpo_kernels.reference.perturb`."""
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
    if soft & (noise == MULTIPLEX):
        value = _multiplex(logp, token, used, scale.to(tl.int32), key)
    return tl.where(used, value, -float("inf"))


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
def _multiplex(logp, token, used, draws, key):
    """log(count / draws) of independent draws from p; -inf where nothing was drawn."""
    count = logp * 0.0
    for draw in range(draws):
        value = logp + gumbel(token, key, draw)
        order = tl.where(used, key_of(value, token), NOTHING)
        count += (order == tl.max(order, axis=0)).to(tl.float32)
    drawn = count > 0.0
    share = tl.div_rn(tl.where(drawn, count, 1.0), count * 0.0 + draws)
    return tl.where(drawn, tl.log(share), -float("inf"))
