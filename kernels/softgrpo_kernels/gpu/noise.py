"""Noise as device functions: the bits of `softgrpo_kernels.noise`.

Kernels that call these are compiled with `enable_fp_fusion=False`, so that a product and a sum stay
two roundings.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from softgrpo_kernels.noise import GAMMA_ATTEMPTS

_GAMMA_ATTEMPTS = tl.constexpr(GAMMA_ATTEMPTS)


class NoiseKey(NamedTuple):
    """What the noise of a row depends on beside the token: integers."""

    seed: tl.tensor
    position: tl.tensor
    uid: tl.tensor
    stream: tl.tensor


@triton.jit
def _philox(ids, key, draw):
    """The words of a block of ids. Draws after the first take the upper half of the stream."""
    c0 = ids.to(tl.uint32)
    zero = c0 * 0
    return tl.philox(
        key.seed, c0, zero + key.position.to(tl.uint32), zero + key.uid.to(tl.uint32),
        zero + (key.stream + (draw << 16)).to(tl.uint32),
    )  # fmt: skip


@triton.jit
def portable_log(x):
    """log of positive normal numbers."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    q = f * 0.0 + -0.07821005582809448
    q = q * f + 0.13003969192504883
    q = q * f + -0.13209381699562073
    q = q * f + 0.141636461019516
    q = q * f + -0.16611094772815704
    q = q * f + 0.20003004372119904
    q = q * f + -0.2500152587890625
    q = q * f + 0.3333330750465393
    q = q * f + -0.49999988079071045
    return exponent.to(tl.float32) * 0.6931471824645996 + ((f * f) * q + f)


@triton.jit
def _upper_bits(word):
    return (word >> 9).to(tl.int32).to(tl.float32)


@triton.jit
def _open_unit(word):
    return (_upper_bits(word) + 0.5) * 1.1920928955078125e-07


@triton.jit
def _exponential(r0, r1):
    v = (_upper_bits(r0) + _open_unit(r1)) * 1.1920928955078125e-07
    v = tl.minimum(v, 0.9999999403953552)
    u = 1.0 - v
    return 0.0 - (portable_log(u) + ((1.0 - u) - v))


@triton.jit
def gumbel(ids, key, draw=0):
    """Standard Gumbel noise of a block of ids."""
    r0, r1, _, _ = _philox(ids, key, draw)
    return 0.0 - portable_log(_exponential(r0, r1))


@triton.jit
def _normal_of(r0, r1, r2):
    s = 0.25 - tl.abs(_open_unit(r2) - 0.5)
    square = s * s
    q = s * 0.0 + -14.381392478942871
    q = q * square + 42.00779724121094
    q = q * square + -76.70417022705078
    q = q * square + 81.605224609375
    q = q * square + -41.34170150756836
    q = q * square + 6.2831854820251465
    return tl.sqrt_rn(2.0 * _exponential(r0, r1)) * (0.0 - q * s)


@triton.jit
def normal(ids, key):
    """Standard normal noise of a block of ids."""
    r0, r1, r2, _ = _philox(ids, key, 0)
    return _normal_of(r0, r1, r2)


@triton.jit
def log_gamma(ids, shape, key):
    """Logarithms of Gamma(shape, 1) numbers of a block of ids."""
    d = shape + 0.6666666865348816
    c = tl.div_rn(d * 0.0 + 1.0, tl.sqrt_rn(9.0 * d))
    log_v = d * 0.0
    accepted = d < 0.0
    for attempt in range(_GAMMA_ATTEMPTS):
        r0, r1, r2, r3 = _philox(ids, key, attempt)
        x = _normal_of(r0, r1, r2)
        root = 1.0 + c * x
        v = root * root * root
        positive = v > 0.0
        new_log_v = portable_log(tl.where(positive, v, 1.0))
        bound = 0.5 * x * x + (d - d * v + d * new_log_v)
        good = positive & (portable_log(_open_unit(r3)) < bound) & (accepted == 0)
        log_v = tl.where(good, new_log_v, log_v)
        accepted = accepted | good
    r0, r1, _, _ = _philox(ids, key, _GAMMA_ATTEMPTS)
    return portable_log(d) + log_v - tl.div_rn(_exponential(r0, r1), shape)
