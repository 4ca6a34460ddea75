"""What other projects do in place of the kernels: the same results as chains of torch ops."""

from __future__ import annotations

import torch
from torch import Tensor


def authors_step(
    logits: Tensor, embed: Tensor, *, top_k: int, top_p: float, tau: float, temperature: float = 1.0
) -> Tensor:
    """One soft step as the released code of SofT-GRPO takes it (research system of arXiv
    2511.06411), renormalisations by sorting. Returns the mixed embedding [B, H]."""
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    probs = _top_p_renorm(_top_k_renorm(probs, top_k), top_p)
    best, ids = probs.topk(top_k, dim=-1)
    best = best / best.sum(-1, keepdim=True)
    noise = -torch.empty_like(best).exponential_().log()
    gprime = torch.log(best + 1e-6) + noise.clamp(-1.5, 3.0)
    weights, order = torch.softmax(gprime / tau, dim=-1).sort(dim=-1, descending=True)
    ids = ids.gather(-1, order)
    return (embed[ids] * weights.to(embed.dtype).unsqueeze(-1)).sum(-2)


def _top_k_renorm(probs: Tensor, k: int) -> Tensor:
    pivot = probs.sort(dim=-1, descending=True).values[:, k - 1 : k]
    kept = torch.where(probs >= pivot, probs, 0.0)
    return kept / kept.sum(-1, keepdim=True)


def _top_p_renorm(probs: Tensor, top_p: float) -> Tensor:
    sorted_probs, order = probs.sort(dim=-1, descending=True)
    before = sorted_probs.cumsum(-1) - sorted_probs
    sorted_probs = torch.where(before < top_p, sorted_probs, 0.0)
    kept = torch.zeros_like(probs).scatter_(-1, order, sorted_probs)
    return kept / kept.sum(-1, keepdim=True)


def topk_step(logits: Tensor, embed: Tensor, *, top_k: int, top_p: float, tau: float) -> Tensor:
    """The same step by somebody who knows that a top-k needs no sort of the vocabulary."""
    best, ids = logits.topk(top_k, dim=-1)
    probs = torch.softmax(best.float(), dim=-1)
    probs = torch.where(probs.cumsum(-1) - probs < top_p, probs, 0.0)
    logp = torch.log(probs / probs.sum(-1, keepdim=True))
    gprime = logp - torch.empty_like(logp).exponential_().log()
    weights = torch.softmax(gprime / tau, dim=-1)
    return (embed[ids].float() * weights.unsqueeze(-1)).sum(-2).to(embed.dtype)


def naive_soft_logprob(hidden: Tensor, head: Tensor, ids: Tensor, gprime: Tensor) -> Tensor:
    """The exact density by way of the logits of the whole vocabulary [N, V]."""
    logp = torch.log_softmax((hidden @ head.T).float(), dim=-1)
    kept = logp.gather(1, ids.long())
    u = gprime - (kept - kept.logsumexp(-1, keepdim=True))
    return (-u - torch.exp(-u)).sum(-1)


def chunked_soft_logprob(
    hidden: Tensor, head: Tensor, ids: Tensor, gprime: Tensor, rows: int = 512
) -> Tensor:
    """The same in chunks of rows, recomputed in the backward pass: never more than [rows, V]."""
    parts = [
        torch.utils.checkpoint.checkpoint(
            naive_soft_logprob,
            hidden[i : i + rows], head, ids[i : i + rows], gprime[i : i + rows],
            use_reentrant=False,
        )
        for i in range(0, len(hidden), rows)
    ]  # fmt: skip
    return torch.cat(parts)


def naive_token_logprob(hidden: Tensor, head: Tensor, label: Tensor) -> Tensor:
    """log softmax(x W^T)[label] by way of [N, V]."""
    logits = (hidden @ head.T).float()
    return torch.log_softmax(logits, dim=-1).gather(1, label[:, None].long())[:, 0]
