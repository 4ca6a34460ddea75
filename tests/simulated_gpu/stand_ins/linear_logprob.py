"""Stand-ins for the kernels of `softgrpo_kernels.gpu.linear_logprob`."""

from __future__ import annotations

import torch
from torch import Tensor

from .memory import first, rows_of
from .statistics import mapped

Grid = tuple[int, ...]


def accumulate_kernel(
    grid: Grid,
    dots: Tensor,
    bias: Tensor,
    temperature: Tensor,
    label: Tensor,
    state: Tensor,
    stride: int,
    width: int,
    begin: int,
    rows: int,
    softcap: float,
    logit_scale: float,
    BIAS: bool,
    SOFTCAP: bool,
    ENTROPY: bool,
    BLOCK: int,
) -> None:
    assert grid[0] == rows
    z_NC = rows_of(dots, rows, stride, width)
    z_NC = mapped(z_NC, first(bias, width) if BIAS else None, softcap, logit_scale, SOFTCAP)
    a_NC = z_NC / first(temperature, rows)[:, None]
    top, mass, weighted, chosen = rows_of(state, 4, rows, rows)
    slot = first(label, rows).long() - begin
    inside = (slot >= 0) & (slot < width)
    picked = a_NC.gather(1, slot.clamp(0, width - 1)[:, None])[:, 0]
    chosen += torch.where(inside, picked, 0.0)
    new_top = torch.maximum(top, a_NC.amax(-1))
    rescale, ratio = torch.exp(top - new_top), torch.exp(a_NC - new_top[:, None])
    mass.mul_(rescale).add_(ratio.sum(-1))
    if ENTROPY:
        weighted.mul_(rescale).add_((ratio * a_NC).sum(-1))
    top.copy_(new_top)


def differentiate_kernel(
    grid: Grid,
    dots: Tensor,
    bias: Tensor,
    temperature: Tensor,
    label: Tensor,
    lse: Tensor,
    entropy: Tensor,
    d_logp: Tensor,
    d_lse: Tensor,
    d_entropy: Tensor,
    stride: int,
    width: int,
    begin: int,
    softcap: float,
    logit_scale: float,
    BIAS: bool,
    SOFTCAP: bool,
    ENTROPY: bool,
    BLOCK: int,
) -> None:
    rows = grid[0]
    assert (grid[1] - 1) * BLOCK < width <= grid[1] * BLOCK
    dots_NC = rows_of(dots, rows, stride, width)
    z_NC = mapped(dots_NC, first(bias, width) if BIAS else None, softcap, logit_scale, SOFTCAP)
    t, chosen = first(temperature, rows)[:, None], first(d_logp, rows)[:, None]
    logp_NC = z_NC / t - first(lse, rows)[:, None]
    factor = first(d_lse, rows)[:, None] - chosen
    if ENTROPY:
        inner = logp_NC + first(entropy, rows)[:, None]
        factor = factor - first(d_entropy, rows)[:, None] * inner
    grad_NC = torch.exp(logp_NC) * factor
    slot = first(label, rows).long() - begin
    grad_NC += torch.where(torch.arange(width) == slot[:, None], chosen, 0.0)
    grad_NC = grad_NC * (logit_scale / t)
    if SOFTCAP:
        grad_NC = grad_NC * (1.0 - (z_NC / softcap) * (z_NC / softcap))
    dots_NC.copy_(grad_NC)
