"""Log-softmax of one token over the whole vocabulary, in slices of it: nothing of [N, V] exists.

Forward keeps log-sum-exp and entropy [N]; backward computes each slice's logits again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of the largest temporary (fp32: 64 MiB).
_CHUNK_ELEMENTS = 1 << 24


class LogitMap(NamedTuple):
    """a = softcap tanh(logit_scale (dot + bias) / softcap) / T, what models do after lm_head.

    bias: [V] or None. temperature: [N, 1] in the dtype of the computation. softcap: None = none.
    """

    bias: Tensor | None
    temperature: Tensor
    softcap: float | None
    logit_scale: float

    def apply_(self, dots_NC: Tensor, tokens: slice) -> Tensor:
        """From dot products with the rows `tokens` of lm_head to a, in place."""
        if self.bias is not None:
            dots_NC += self.bias[tokens]
        if self.logit_scale != 1.0:
            dots_NC *= self.logit_scale
        if self.softcap is not None:
            dots_NC.div_(self.softcap).tanh_().mul_(self.softcap)
        return dots_NC.div_(self.temperature)

    def slope(self, a_NC: Tensor) -> Tensor:
        """da / d(dot or bias) [N, C], or [N, 1] where it is the same for all tokens."""
        slope = self.logit_scale / self.temperature
        if self.softcap is None:
            return slope
        return slope * (1.0 - (a_NC * (self.temperature / self.softcap)).square())


def token_logprob(
    hidden: Tensor, lm_head: Tensor, label: Tensor, logit_map: LogitMap, *, need_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probability of label, log-sum-exp, entropy), each [N]; entropy is 0 if not needed."""
    if hidden.is_cuda and hidden.dtype != torch.float64:
        from softgrpo_kernels.gpu import token_logprob as gpu

        return gpu.token_logprob(hidden, lm_head, label, logit_map, need_entropy=need_entropy)
    wide = logit_map.temperature.dtype
    x_NH = hidden.to(wide)
    top = torch.full_like(logit_map.temperature, -torch.inf)
    mass, weighted = torch.zeros_like(top), torch.zeros_like(top)
    chosen = torch.zeros_like(top)
    for tokens, weight_CH in vocabulary_slices(lm_head, len(label), wide):
        a_NC = logit_map.apply_(x_NH @ weight_CH.mT, tokens)
        slot, inside = _slot(label, tokens, len(weight_CH))
        chosen = torch.where(inside, a_NC.gather(1, slot), chosen)
        new_top = torch.maximum(top, a_NC.amax(-1, keepdim=True))
        # Moving the reference point: exp(a - top) a stays exact in a, only the factor changes.
        rescale = torch.exp(top - new_top)
        ratio_NC = torch.exp_(a_NC - new_top)
        mass = mass * rescale + ratio_NC.sum(-1, keepdim=True)
        if need_entropy:
            weighted = weighted * rescale + ratio_NC.mul_(a_NC).sum(-1, keepdim=True)
        top = new_top
    lse = top + mass.log()
    entropy = lse - weighted / mass if need_entropy else torch.zeros_like(lse)
    return (chosen - lse)[:, 0], lse[:, 0], entropy[:, 0]


class TokenGradients(NamedTuple):
    """Gradients of the three results of `token_logprob`, each [N]; entropy's None: not needed."""

    logp: Tensor
    lse: Tensor
    entropy: Tensor | None


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
    """Returns d hidden [N, H] in the dtype of the computation; adds into d_weight and d_bias.

    d logp / d a_j = 1[j = label] - p_j; d entropy / d a_j = -p_j (log p_j + entropy);
    d lse / d a_j = p_j.
    """
    if hidden.is_cuda and hidden.dtype != torch.float64:
        from softgrpo_kernels.gpu import token_logprob as gpu

        return gpu.token_logprob_backward(
            grads, hidden, lm_head, label, logit_map, lse, entropy,
            need_hidden=need_hidden, d_weight=d_weight, d_bias=d_bias,
        )  # fmt: skip
    wide = logit_map.temperature.dtype
    x_NH = hidden.to(wide)
    lse, entropy = lse[:, None], entropy[:, None]
    chosen, common = grads.logp[:, None], (grads.lse - grads.logp)[:, None]
    d_hidden = torch.zeros_like(x_NH) if need_hidden else None
    for tokens, weight_CH in vocabulary_slices(lm_head, len(label), wide):
        a_NC = logit_map.apply_(x_NH @ weight_CH.mT, tokens)
        slope = logit_map.slope(a_NC)
        logp_NC = a_NC.sub_(lse)
        factor = common
        if grads.entropy is not None:
            factor = factor - grads.entropy[:, None] * (logp_NC + entropy)
        grad_NC = logp_NC.exp_().mul_(factor)
        slot, inside = _slot(label, tokens, len(weight_CH))
        grad_NC.scatter_add_(1, slot, torch.where(inside, chosen, 0.0))
        grad_NC.mul_(slope)
        if d_hidden is not None:
            d_hidden.addmm_(grad_NC, weight_CH)
        if d_weight is not None:
            _add_product(d_weight[tokens], grad_NC.mT, x_NH)
        if d_bias is not None:
            d_bias[tokens] += grad_NC.sum(0).to(d_bias.dtype)
    return d_hidden


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out += left @ right, rounded once."""
    if out.dtype == left.dtype:
        out.addmm_(left, right)
    else:
        out.copy_(out.to(left.dtype).addmm_(left, right))


def _slot(label: Tensor, tokens: slice, width: int) -> tuple[Tensor, Tensor]:
    """(place of the label in the slice, clamped; whether it is there), both [N, 1]."""
    slot = label[:, None].long() - tokens.start
    return slot.clamp(0, width - 1), (slot >= 0) & (slot < width)


def vocabulary_slices(
    lm_head: Tensor, rows: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """(tokens, their weights [C, H]) over the vocabulary; each slice is converted once."""
    step = max(256, _CHUNK_ELEMENTS // max(1, rows, lm_head.shape[1]))
    for begin in range(0, lm_head.shape[0], step):
        tokens = slice(begin, min(begin + step, lm_head.shape[0]))
        yield tokens, lm_head[tokens].to(dtype)
