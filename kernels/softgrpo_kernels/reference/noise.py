"""Gumbel noise as a pure function of (seed, uid, position, token id), bit for bit.

The transform uses fp32 multiplications, additions and integer operations only, each rounded once:
every back end that keeps to the same order of operations gets the same bits.
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


def gumbel_from_words(r0: Tensor, r1: Tensor) -> Tensor:
    """Standard Gumbel numbers, fp32, from the first two words of Philox.

    46 bits make v in (0, 1); g = -log(-log(1 - v)). The winning tail is v -> 0, where v keeps its
    full relative precision. -2.81 <= g <= 32.6.
    """
    low = ((r1 >> 9).to(torch.float32) + 0.5) * 2.0**-23
    v = ((r0 >> 9).to(torch.float32) + low) * 2.0**-23
    v = v.clamp(max=1.0 - 2.0**-24)
    # log1p(-v) = log(u) + ((1 - u) - v) with u = fl(1 - v): the second term is what u lost.
    u = 1.0 - v
    exponential = -(portable_log(u) + ((1.0 - u) - v))
    return -portable_log(exponential)


def gumbel_noise(
    ids: Tensor, seed: Tensor, position: Tensor, uid: Tensor, stream: Tensor
) -> Tensor:
    """Noise fp32 of ids [..., K]; the other arguments, int64, broadcast against ids[..., 0].

    Slots with id < 0 get 0.
    """
    seed, position, uid, stream = (x.unsqueeze(-1) for x in (seed, position, uid, stream))
    tokens = ids.long()
    r0, r1, _, _ = philox4x32(
        (tokens & _MASK, position, uid, stream), (seed & _MASK, (seed >> 32) & _MASK)
    )
    return torch.where(tokens >= 0, gumbel_from_words(r0, r1), 0.0)
