"""The noise of the slots, as `gpu.soft_token.perturb`."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_kernels import noise as plain
from softgrpo_kernels.methods import (
    DIRICHLET,
    GAUSSIAN,
    MIXTURE_OF_INPUTS,
    MULTIPLEX,
    MULTIPLEX_WEIGHTED,
    NONE,
)
from softgrpo_kernels.methods.dirichlet import MIN_SHAPE
from softgrpo_kernels.methods.gaussian import MIN_WEIGHT
from softgrpo_kernels.methods.multiplex_weighted import COUNT_BITS, MIN_LOG_WEIGHT
from softgrpo_kernels.row_parameters import RowParameters
from softgrpo_kernels.row_rules import SOFT

from .gumbel_noise import gumbel_noise
from .keys import NOTHING, key_of


def perturb(
    logp: Tensor, token: Tensor, used: Tensor, rows: RowParameters
) -> tuple[Tensor, Tensor | None]:
    """g' of every slot [B, K], -inf where it is not used, and which comes first (None: none)."""
    soft = (rows.mode == SOFT)[:, None]
    noise, scale = rows.noise[:, None], rows.noise_scale[:, None]
    keys = (rows.seed, rows.position, rows.uid, rows.stream)
    g = gumbel_noise(token, *keys)
    low, high = rows.clamp_low[:, None], rows.clamp_high[:, None]
    clamped = scale * torch.minimum(torch.maximum(g, low), high)
    value = logp + torch.where(soft, clamped, g)
    value = torch.where(soft & (noise == NONE), logp, value)
    if bool((rows.noise <= NONE).all()):
        return value.masked_fill_(~used, -torch.inf), None
    for kind, method in ((DIRICHLET, _dirichlet), (GAUSSIAN, _gaussian)):
        chosen = soft & (noise == kind) & used.any(-1, keepdim=True)
        if bool(chosen.any()):
            other = method(logp, token, used, torch.where(chosen, scale, 1.0), keys)
            value = torch.where(chosen, other, value)
    draws_token = soft & (noise >= MULTIPLEX) & used.any(-1, keepdim=True)
    first = None
    if bool(draws_token.any()):
        draws = torch.where(draws_token & (noise <= MULTIPLEX_WEIGHTED), scale, 1.0)
        count, first = _draws(logp, token, used, draws.int(), keys)
        first &= draws_token
        drawn = torch.where(noise == MULTIPLEX, plain.portable_log(count.clamp(min=1) / draws),
                            _weighted(logp, count.clamp(min=1)))  # fmt: skip
        drawn = torch.where(count > 0.0, drawn, -torch.inf)
        other = torch.where(noise == MIXTURE_OF_INPUTS, _mixture(logp, used, first, scale), logp)
        other = torch.where(noise <= MULTIPLEX_WEIGHTED, drawn, other)
        value = torch.where(draws_token, other, value)
    return value.masked_fill(~used, -torch.inf), first


def _dirichlet(
    logp: Tensor, token: Tensor, used: Tensor, scale: Tensor, keys: tuple[Tensor, ...]
) -> Tensor:
    shape = torch.where(used, (scale * torch.exp(logp)).clamp(min=MIN_SHAPE), 1.0)
    log_g = _log_gamma(token, shape, keys)
    top = torch.where(used, log_g, -torch.inf).amax(-1, keepdim=True)
    mass = torch.where(used, torch.exp(log_g - top), 0.0).sum(-1, keepdim=True)
    return log_g - top - torch.log(mass)


def _log_gamma(token: Tensor, shape: Tensor, keys: tuple[Tensor, ...]) -> Tensor:
    """`log_gamma_noise` with all attempts at once, along a middle axis."""
    attempts = torch.arange(plain.GAMMA_ATTEMPTS + 1)
    seed, position, uid, stream = (key[:, None] for key in keys)
    words = plain._words(token[:, None], seed, position, uid, stream + (attempts << 16))
    exponential = plain.exponential_from_words(words[0][:, -1], words[1][:, -1])
    r0, r1, r2, r3 = (word[:, :-1] for word in words)
    d = shape[:, None] + plain._TWO_THIRDS
    x = plain.normal_from_words(r0, r1, r2)
    root = 1.0 + (1.0 / plain._square_root(9.0 * d)) * x
    v = root * root * root
    log_v = plain.portable_log(torch.where(v > 0.0, v, 1.0))
    bound = 0.5 * x * x + (d - d * v + d * log_v)
    good = (v > 0.0) & (plain.portable_log(plain._open_unit(r3)) < bound)
    first_good = good & (good.cumsum(1) == 1)
    log_v = torch.where(first_good, log_v, 0.0).sum(1)
    return plain.portable_log(d[:, 0]) + log_v - exponential / shape


def _gaussian(
    logp: Tensor, token: Tensor, used: Tensor, scale: Tensor, keys: tuple[Tensor, ...]
) -> Tensor:
    noisy = torch.exp(logp.double()) + (scale * plain.normal_noise(token, *keys)).double()
    return torch.log(noisy.clamp(min=MIN_WEIGHT)).float()


def _draws(
    logp: Tensor, token: Tensor, used: Tensor, draws: Tensor, keys: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """(how often every slot was drawn, which was first), of all draws at once: [B, D, K]."""
    draw = torch.arange(int(draws.max()))
    seed, position, uid, stream = (key[:, None] for key in keys)
    tokens = token[:, None].expand(-1, len(draw), -1)
    noise = gumbel_noise(tokens, seed, position, uid, stream + (draw << 16))
    order = torch.where(used[:, None], key_of(logp[:, None] + noise, token[:, None]), NOTHING)
    won = (order == order.amax(-1, keepdim=True)) & used[:, None] & (draw < draws)[..., None]
    return won.sum(1).float(), won[:, 0]


def _weighted(logp: Tensor, count: Tensor) -> Tensor:
    value = logp + plain.portable_log(count)
    value = torch.where(value.abs() < MIN_LOG_WEIGHT, MIN_LOG_WEIGHT, value)
    low, size = count.int() - 1, 1 << COUNT_BITS
    return (((value.view(torch.int32) - low + size // 2) & -size) | low).view(torch.float32)


def _mixture(logp: Tensor, used: Tensor, drawn: Tensor, beta: Tensor) -> Tensor:
    best = logp.masked_fill(~used, -torch.inf).amax(-1, keepdim=True)
    below = torch.where(used, best - logp, 0.0).double()
    ratio = torch.where(used, torch.exp(-below), 0.0)
    total = ratio.sum(-1, keepdim=True)
    entropy = torch.log(total) + (ratio * below).sum(-1, keepdim=True) / total
    most = used.sum(-1, keepdim=True).clamp(min=2).double().log()
    uncertainty = (entropy / most).clamp(max=1.0)
    share = uncertainty / (1.0 + beta.double())
    log_p = -below - torch.log(total)
    token = share * (torch.exp(log_p) + beta) + (1.0 - uncertainty)
    return torch.where(drawn, torch.log(token), torch.log(share) + log_p).float()
