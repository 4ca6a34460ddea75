"""The passes of `linear_logprob_passes` over a slice of logits, each one read, in Triton.

A program owns a row and walks along it in blocks, so that its sums have one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softgrpo_kernels.gpu.softcap import scaled_and_capped
from softgrpo_kernels.linear_logprob_slices import LogitMap, TokenGradients, vocabulary_slices

BLOCK = 2048


@triton.jit
def _logits(dots, bias, inside, softcap, logit_scale, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """Those before the temperature."""
    z = dots
    if BIAS:
        z += tl.load(bias, mask=inside, other=0.0).to(tl.float32)
    return scaled_and_capped(z, logit_scale, softcap, SOFTCAP)


@triton.jit(do_not_specialize=["begin", "rows"])
def accumulate_kernel(
    dots, bias, temperature, label, state, stride, width, begin, rows, softcap, logit_scale,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i: adds the slice of row i to (maximum, mass, sum of exp(a - max) a, a of label)."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(temperature + row)
    slot = tl.load(label + row) - begin
    top, mass = tl.load(state + row), tl.load(state + rows + row)
    weighted, chosen = tl.load(state + 2 * rows + row), tl.load(state + 3 * rows + row)
    for start in range(0, width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < width
        dot = tl.load(dots + row * stride + i, mask=inside, other=0.0)
        a = tl.div_rn(_logits(dot, bias + i, inside, softcap, logit_scale, BIAS, SOFTCAP), t)
        a = tl.where(inside, a, -float("inf"))
        chosen += tl.sum(tl.where((i == slot) & inside, a, 0.0), axis=0)
        new_top = tl.maximum(top, tl.max(a, axis=0))
        rescale = tl.exp(top - new_top)
        ratio = tl.exp(a - new_top)
        mass = mass * rescale + tl.sum(ratio, axis=0)
        if ENTROPY:
            weighted = weighted * rescale + tl.sum(tl.where(inside, ratio * a, 0.0), axis=0)
        top = new_top
    tl.store(state + row, top)
    tl.store(state + rows + row, mass)
    tl.store(state + 2 * rows + row, weighted)
    tl.store(state + 3 * rows + row, chosen)


@triton.jit(do_not_specialize=["begin"])
def differentiate_kernel(
    dots, bias, temperature, label, lse, entropy, d_logp, d_lse, d_entropy, stride, width, begin,
    softcap, logit_scale,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (i, b): block b of the slice of row i, from dot products to their gradient."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    t = tl.load(temperature + row)
    place = dots + row * stride + i
    dot = tl.load(place, mask=inside, other=0.0)
    z = _logits(dot, bias + i, inside, softcap, logit_scale, BIAS, SOFTCAP)
    logp = tl.div_rn(z, t) - tl.load(lse + row)
    chosen = tl.load(d_logp + row)
    factor = tl.load(d_lse + row) - chosen
    if ENTROPY:
        factor = factor - tl.load(d_entropy + row) * (logp + tl.load(entropy + row))
    grad = tl.exp(logp) * factor
    grad += tl.where(i == tl.load(label + row) - begin, chosen, 0.0)
    grad = grad * (logit_scale / t)
    if SOFTCAP:
        grad = grad * (1.0 - (z / softcap) * (z / softcap))
    tl.store(place, grad, mask=inside)


def accumulate(
    dots: Tensor,
    begin: int,
    bias: Tensor | None,
    temperature: Tensor,
    label: Tensor,
    state: Tensor,
    *,
    softcap: float | None,
    logit_scale: float,
    need_entropy: bool,
) -> None:
    """Adds the dot products [N, C] with the tokens from `begin` on to `state`.

    bias: those tokens' [C]. state: fp32 [4, N], at first (-inf, 0, 0, 0): maximum, mass,
    sum of exp(a - maximum) a, a of the label.
    """
    rows, width = dots.shape
    if rows:
        accumulate_kernel[(rows,)](
            dots, dots if bias is None else bias, temperature, label, state, dots.stride(0),
            width, begin, rows, float(softcap or 0.0), float(logit_scale), BIAS=bias is not None,
            SOFTCAP=softcap is not None, ENTROPY=need_entropy, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip


def differentiate_(
    dots: Tensor,
    begin: int,
    bias: Tensor | None,
    temperature: Tensor,
    label: Tensor,
    lse: Tensor,
    entropy: Tensor,
    d_logp: Tensor,
    d_lse: Tensor,
    d_entropy: Tensor | None,
    *,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """Turns the dot products of a slice into their gradient, in place; all else is [N]."""
    rows, width = dots.shape
    if rows:
        differentiate_kernel[(rows, triton.cdiv(width, BLOCK))](
            dots, dots if bias is None else bias, temperature, label, lse, entropy, d_logp, d_lse,
            lse if d_entropy is None else d_entropy, dots.stride(0), width, begin,
            float(softcap or 0.0), float(logit_scale), BIAS=bias is not None,
            SOFTCAP=softcap is not None, ENTROPY=d_entropy is not None, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return dots


def token_logprob(
    hidden: Tensor, lm_head: Tensor, label: Tensor, logit_map: LogitMap, *, need_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `softgrpo_kernels.linear_logprob_passes.token_logprob`: the same, its passes fused."""
    state = hidden.new_zeros((4, len(label)), dtype=torch.float32)
    state[0] = -torch.inf
    temperature = logit_map.temperature[:, 0].contiguous()
    for tokens, weight_CH in vocabulary_slices(lm_head, len(label), lm_head.dtype):
        accumulate(
            _product(hidden, weight_CH.mT), tokens.start, _slice(logit_map.bias, tokens),
            temperature, label, state, softcap=logit_map.softcap,
            logit_scale=logit_map.logit_scale, need_entropy=need_entropy,
        )  # fmt: skip
    top, mass, weighted, chosen = state
    lse = top + mass.log()
    entropy = lse - weighted / mass if need_entropy else torch.zeros_like(lse)
    return chosen - lse, lse, entropy


def token_logprob_backward(
    grads: TokenGradients,
    hidden: Tensor,
    lm_head: Tensor,
    label: Tensor,
    logit_map: LogitMap,
    lse: Tensor,
    entropy: Tensor,
    *,
    need_hidden: bool,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> Tensor | None:
    """See `softgrpo_kernels.linear_logprob_passes.token_logprob_backward`.

    Products with low-precision tensors take the gradient of the logits in their dtype, as autograd
    through a low-precision LM head does, and accumulate in fp32.
    """
    d_hidden = torch.zeros(hidden.shape, device=hidden.device) if need_hidden else None
    temperature = logit_map.temperature[:, 0].contiguous()
    for tokens, weight_CH in vocabulary_slices(lm_head, len(label), lm_head.dtype):
        grad_NC = differentiate_(
            _product(hidden, weight_CH.mT), tokens.start, _slice(logit_map.bias, tokens),
            temperature, label, lse, entropy, grads.logp.float().contiguous(),
            grads.lse.float().contiguous(),
            None if grads.entropy is None else grads.entropy.float().contiguous(),
            softcap=logit_map.softcap, logit_scale=logit_map.logit_scale,
        )  # fmt: skip
        if d_bias is not None:
            d_bias[tokens] += grad_NC.sum(0).to(d_bias.dtype)
        grad_NC = grad_NC.to(hidden.dtype)
        if d_hidden is not None:
            d_hidden += _product(grad_NC, weight_CH)
        if d_weight is not None:
            total = d_weight[tokens].float() + _product(grad_NC.mT, hidden)
            d_weight[tokens] = total.to(d_weight.dtype)
    return d_hidden


def _slice(bias: Tensor | None, tokens: slice) -> Tensor | None:
    return None if bias is None else bias[tokens].contiguous()


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right with the fp32 sums as they are: logits are not rounded to bf16."""
    if left.dtype == torch.float32:
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32)
