"""Log-probabilities by way of the logits of the whole vocabulary [N, V], differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softgrpo_kernels.soft_density import soft_density


def linear_logprobs(
    hidden: Tensor,
    lm_head: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Log-softmax over all tokens [N, V]; logits as Phi (bias), Cohere (scale) and Gemma 2
    (softcap) write them down."""
    logits = torch.nn.functional.linear(hidden, lm_head, bias) * logit_scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    column = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    return torch.log_softmax(logits / column, -1)


def linear_candidate_logprob(
    hidden: Tensor, lm_head: Tensor, ids: Tensor, **options: Any
) -> Tensor:
    """[N, K], the full softmax gathered and renormalised; -inf where ids < 0."""
    full = linear_logprobs(hidden, lm_head, **options)
    picked = full.gather(1, ids.clamp(min=0).long()).masked_fill(ids < 0, -torch.inf)
    return picked - picked.logsumexp(-1, keepdim=True)


def linear_token_logprob(
    hidden: Tensor, lm_head: Tensor, label: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """(log-probability, entropy), [N] each."""
    full = linear_logprobs(hidden, lm_head, **options)
    return full.gather(1, label[:, None].long())[:, 0], -(full.exp() * full).sum(-1)


def linear_soft_logprob(
    hidden: Tensor,
    lm_head: Tensor,
    ids: Tensor,
    gprime: Tensor,
    row_kind: Tensor,
    label: Tensor,
    objective: str = "exact",
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """(log-density, entropy), [N] each; ids of slots that are not used are < 0."""
    logq = linear_candidate_logprob(hidden, lm_head, ids, **options)
    token, entropy = linear_token_logprob(hidden, lm_head, label, **options)
    soft = soft_density(logq, gprime, objective=objective)
    return torch.where(row_kind == 1, soft, token), entropy
