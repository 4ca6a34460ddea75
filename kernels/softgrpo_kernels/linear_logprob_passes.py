"""Log-softmax of one token over the whole vocabulary, in slices of it: nothing of [N, V] exists.

Forward keeps log-sum-exp and entropy [N]; backward computes each slice's logits again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_kernels.linear_logprob_slices import LogitMap, TokenGradients, vocabulary_slices


def token_logprob(
    hidden: Tensor, lm_head: Tensor, label: Tensor, logit_map: LogitMap, *, need_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probability of label, log-sum-exp, entropy), each [N]; entropy is 0 if not needed."""
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
