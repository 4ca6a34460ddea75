"""Noise as a pure function of (seed, uid, position, token id), bit for bit.

The transforms use fp32 multiplications, additions, divisions, square roots and integer operations
only, each rounded once: every back end that keeps to the same order of operations gets the same
bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

_LN2 = float.fromhex("0x1.62e430p-1")
_SQRT_HALF_BITS = 0x3F3504F3
# log(1 + f) = f + f^2 Q(f) on sqrt(1/2) - 1 <= f < sqrt(2) - 1: a minimax fit of Q in the relative
# error of the logarithm (4e-9; 7e-9 after rounding the coefficients to fp32), constant term first.
_LOG_COEFFICIENTS = tuple(
    float.fromhex(c)
    for c in (
        "-0x1.fffff8p-2",
        "0x1.555544p-2",
        "-0x1.000400p-2",
        "0x1.99a95ap-3",
        "-0x1.5431fap-3",
        "0x1.22124cp-3",
        "-0x1.0e8734p-3",
        "0x1.0a5240p-3",
        "-0x1.405930p-4",
    )
)

# sin(2 pi s) = s Q(s^2) on |s| <= 1/4: a minimax fit, 2e-11 relative before rounding.
_SINE_COEFFICIENTS = tuple(
    float.fromhex(c)
    for c in (
        "0x1.921fb6p+2",
        "-0x1.4abbcep+5",
        "0x1.466bc0p+6",
        "-0x1.32d112p+6",
        "0x1.500ff8p+5",
        "-0x1.cc345ep+3",
    )
)
GAMMA_ATTEMPTS = 8
_TWO_THIRDS = float.fromhex("0x1.555556p-1")


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011) on int64 tensors that hold 32-bit words.

    Args:
        counter: four tensors of words, broadcast against each other; key: two.

    Returns:
        Four tensors of words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The low 64 bits of the product are all there is, so its sign does not matter.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32) & _MASK ^ c1 ^ k0,
            product1 & _MASK,
            (product0 >> 32) & _MASK ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def portable_log(x: Tensor) -> Tensor:
    """log of positive normal fp32 numbers by multiplications and additions."""
    bits = x.view(torch.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    q = torch.full_like(f, _LOG_COEFFICIENTS[-1])
    for coefficient in reversed(_LOG_COEFFICIENTS[:-1]):
        q = q * f + coefficient
    return exponent.to(torch.float32) * _LN2 + ((f * f) * q + f)


def exponential_from_words(r0: Tensor, r1: Tensor) -> Tensor:
    """Standard exponential numbers, fp32, from two words: -log(1 - v), v in (0, 1) of 46 bits."""
    low = ((r1 >> 9).to(torch.float32) + 0.5) * 2.0**-23
    v = ((r0 >> 9).to(torch.float32) + low) * 2.0**-23
    v = v.clamp(max=1.0 - 2.0**-24)
    # log1p(-v) = log(u) + ((1 - u) - v) with u = fl(1 - v): the second term is what u lost.
    u = 1.0 - v
    return -(portable_log(u) + ((1.0 - u) - v))


def gumbel_from_words(r0: Tensor, r1: Tensor) -> Tensor:
    """Standard Gumbel numbers, fp32: -log of an exponential number.

    The winning tail is v -> 0, where v keeps its full relative precision. -2.81 <= g <= 32.6.
    """
    return -portable_log(exponential_from_words(r0, r1))


def normal_from_words(r0: Tensor, r1: Tensor, r2: Tensor) -> Tensor:
    """Standard normal numbers, fp32 (Box and Muller 1958): sqrt(2 E) cos(2 pi u)."""
    u = _open_unit(r2)
    # cos(2 pi u) = -sin(2 pi s), |s| <= 1/4; every step up to s is exact.
    s = 0.25 - (u - 0.5).abs()
    square = s * s
    q = torch.full_like(s, _SINE_COEFFICIENTS[-1])
    for coefficient in reversed(_SINE_COEFFICIENTS[:-1]):
        q = q * square + coefficient
    return _square_root(2.0 * exponential_from_words(r0, r1)) * -(q * s)


def _square_root(x: Tensor) -> Tensor:
    """Rounded to nearest. (torch's own fp32 square root is not, on a CPU, for 0.7 % of numbers.)"""
    return x.double().sqrt().to(torch.float32)


def _open_unit(word: Tensor) -> Tensor:
    """Uniform numbers of 23 bits in the open interval (0, 1), exact in fp32."""
    return ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23


def _words(
    ids: Tensor, seed: Tensor, position: Tensor, uid: Tensor, stream: Tensor, draw: int = 0
) -> tuple[Tensor, ...]:
    """The four words of ids [..., K]; the others, int64, broadcast against ids[..., 0].

    Draws after the first take the upper half of the word of the stream.
    """
    seed, position, uid, stream = (x.unsqueeze(-1) for x in (seed, position, uid, stream))
    return philox4x32(
        (ids.long() & _MASK, position, uid, stream + (draw << 16)),
        (seed & _MASK, (seed >> 32) & _MASK),
    )


def gumbel_noise(
    ids: Tensor, seed: Tensor, position: Tensor, uid: Tensor, stream: Tensor, draw: int = 0
) -> Tensor:
    """Noise fp32 of ids [..., K]; the other arguments, int64, broadcast against ids[..., 0].

    Slots with id < 0 get 0.
    """
    r0, r1, _, _ = _words(ids, seed, position, uid, stream, draw)
    return torch.where(ids >= 0, gumbel_from_words(r0, r1), 0.0)


def normal_noise(
    ids: Tensor, seed: Tensor, position: Tensor, uid: Tensor, stream: Tensor, draw: int = 0
) -> Tensor:
    """Standard normal noise fp32, with the arguments of `gumbel_noise`."""
    r0, r1, r2, _ = _words(ids, seed, position, uid, stream, draw)
    return torch.where(ids >= 0, normal_from_words(r0, r1, r2), 0.0)


def log_gamma_noise(
    ids: Tensor, shape: Tensor, seed: Tensor, position: Tensor, uid: Tensor, stream: Tensor
) -> Tensor:
    """Logarithms of Gamma(shape, 1) numbers, fp32: Marsaglia and Tsang 2000 for shape + 1, times
    U^(1/shape).

    Args:
        ids: int [..., K]. shape: fp32 [..., K], > 0.

    Eight attempts at most are made, each of which succeeds with probability > 0.95; after that
    (4e-11 of the draws) the number is the mode's.
    """
    d = shape + _TWO_THIRDS
    c = 1.0 / _square_root(9.0 * d)
    log_v, accepted = torch.zeros_like(shape), torch.zeros_like(shape, dtype=torch.bool)
    for attempt in range(GAMMA_ATTEMPTS):
        r0, r1, r2, r3 = _words(ids, seed, position, uid, stream, attempt)
        x = normal_from_words(r0, r1, r2)
        root = 1.0 + c * x
        v = root * root * root
        positive = v > 0.0
        attempt_log_v = portable_log(torch.where(positive, v, 1.0))
        bound = 0.5 * x * x + (d - d * v + d * attempt_log_v)
        good = positive & (portable_log(_open_unit(r3)) < bound) & ~accepted
        log_v = torch.where(good, attempt_log_v, log_v)
        accepted |= good
    r0, r1, _, _ = _words(ids, seed, position, uid, stream, GAMMA_ATTEMPTS)
    log_gamma = portable_log(d) + log_v - exponential_from_words(r0, r1) / shape
    return torch.where(ids >= 0, log_gamma, 0.0)
