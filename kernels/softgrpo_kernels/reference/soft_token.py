"""One soft step in plain PyTorch, step by step, on any device, up to float64."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_kernels.lm_head import LMHead
from softgrpo_kernels.noise import gumbel_noise
from softgrpo_kernels.reference.perturb import perturb
from softgrpo_kernels.reference.soft_embedding import soft_embedding
from softgrpo_kernels.row_parameters import RowParameters
from softgrpo_kernels.row_rules import DISCRETE, GREEDY, SKIP, SOFT
from softgrpo_kernels.soft_token_tensors import SoftToken, SoftTokenInputs
from softgrpo_kernels.soft_weights import weights_within
from softgrpo_kernels.tensors import wide_dtype


def soft_token(inputs: SoftTokenInputs, rows: RowParameters, out: SoftToken) -> None:
    """Fills `out`; meaning: `softgrpo_kernels.soft_token`, with the row parameters packed."""
    logits, embed, terminal_ids, head, joint = inputs
    assert logits is not None
    z_BV = logits.to(wide_dtype(logits.dtype))
    skipped = rows.mode == SKIP
    finite = (z_BV < torch.inf).all(-1) & (z_BV > -torch.inf).any(-1)
    drawn = (rows.mode == DISCRETE) | (rows.mode == SOFT)
    finite &= ~drawn | (z_BV.amax(-1) / rows.temperature).isfinite()
    good = finite & rows.sound
    sampled = good & ~skipped
    z_BV = torch.where(sampled[:, None], z_BV, 0.0)

    out.fill_padding()
    out.valid.copy_(good | skipped)
    out.kind.copy_(sampled & (rows.mode == SOFT))
    ids, z_BK = _top_candidates(z_BV, min(rows.k_max, logits.shape[1]))
    _sample_listed(out, ids, z_BK, z_BV, rows, sampled, head, joint)
    _sample_greedy(out, ids, z_BV, sampled & (rows.mode == GREEDY))
    for row in (sampled & rows.unlisted).nonzero().flatten().tolist():
        _sample_unlisted(out, z_BV[row], rows, row, joint)

    out.n.copy_((out.ids >= 0).sum(-1))
    out.token.copy_(out.ids[:, 0])
    out.token_logp.copy_(out.logp[:, 0])
    if terminal_ids is not None:
        ended = ((terminal_ids == out.token[:, None]) & (terminal_ids >= 0)).any(-1)
        out.kind.masked_fill_(ended, 0)
    if out.kept_mass is not None:
        out.kept_mass.masked_fill_(out.kind == 1, torch.nan)
    out.weights.copy_(weights_within(out.gprime, out.kind, rows.tau, rows.reach))
    if embed is not None and out.embed is not None:
        out.embed.copy_(soft_embedding(out.ids, out.weights, embed))
    if out.lse is not None or out.entropy is not None:
        _write_statistics(out, z_BV, rows, sampled)


def _top_candidates(z_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k by (logit descending, id ascending): ids int64 [B, k] and logits [B, k]."""
    kth = z_BV.topk(k, dim=-1).values[:, -1:]
    above, tied = z_BV > kth, z_BV == kth
    free = k - above.sum(-1, keepdim=True)
    chosen = above | (tied & (tied.cumsum(-1) <= free))
    ids = chosen.nonzero()[:, 1].view(-1, k)
    z_BK, order = z_BV.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return ids.gather(1, order), z_BK


def _sample_listed(
    out: SoftToken,
    ids: Tensor,
    z_BK: Tensor,
    z_BV: Tensor,
    rows: RowParameters,
    sampled: Tensor,
    head: LMHead | None,
    joint: bool,
) -> None:
    """Rows whose candidates are recorded: steps 1 to 5 and the order of the slots."""
    slots = torch.arange(ids.shape[1], device=ids.device)
    # A token masked out by -inf is no candidate.
    live = (sampled & rows.listed)[:, None] & (slots < rows.top_k[:, None]) & (z_BK > -torch.inf)
    if head is not None:
        z_BK = torch.where(live, head.logits_of(ids, z_BK.dtype), z_BK)
        z_BV = z_BV.scatter(1, ids, z_BK)
    a_BK = (z_BK / rows.temperature[:, None]).masked_fill(~live, -torch.inf)
    ids, a_BK, live = _sorted(a_BK, ids, live)

    mass = _mass(z_BV / rows.temperature[:, None]) if joint else None
    kept, logp_64 = _renormalise(a_BK, live, rows.top_p, rows.min_p, mass)
    if out.kept_mass is not None:
        kept_mass = _kept_mass(a_BK, kept, z_BV / rows.temperature[:, None])
        out.kept_mass.copy_(torch.where(live.any(-1), kept_mass, torch.nan))
    # eps: every candidate stays, those that top-p cut with p = 0.
    eps = torch.where((rows.mode == SOFT)[:, None], rows.eps[:, None], 0.0).double()
    with_eps = torch.log(torch.where(kept, logp_64.exp(), 0.0) + eps)
    used = torch.where(eps > 0, live, kept)
    logp = torch.where(eps > 0, with_eps, logp_64).to(a_BK.dtype)

    gprime, first = perturb(logp, ids, used, rows)
    # A candidate with g' = -inf still comes before the slots that are not used.
    order = gprime.clamp(min=torch.finfo(gprime.dtype).min).masked_fill(first, torch.inf)
    order = order.masked_fill(~used, -torch.inf)
    ids, _, gprime, logp, used = _sorted(order, ids, gprime, logp, used)
    width = ids.shape[1]
    out.ids[:, :width] = torch.where(used, ids, -1).int()
    out.gprime[:, :width] = gprime
    out.logp[:, :width] = torch.where(used, logp, -torch.inf)


def _sample_greedy(out: SoftToken, ids: Tensor, z_BV: Tensor, greedy: Tensor) -> None:
    if not bool(greedy.any()):
        return
    token = ids[greedy, 0]
    logp = z_BV[greedy].double().log_softmax(-1).gather(1, token[:, None])[:, 0]
    out.ids[greedy, 0] = token.int()
    out.gprime[greedy, 0] = logp.to(out.gprime.dtype)
    out.logp[greedy, 0] = logp.to(out.logp.dtype)
    if out.kept_mass is not None:
        out.kept_mass[greedy] = 1.0


def _sample_unlisted(
    out: SoftToken, z_V: Tensor, rows: RowParameters, row: int, joint: bool
) -> None:
    """Gumbel-max over the whole vocabulary, or its nucleus: only the token is recorded."""
    a_V, order = (z_V / rows.temperature[row]).sort(descending=True, stable=True)
    live, mass = a_V > -torch.inf, _mass(a_V[None]) if joint else None
    top_k = int(rows.top_k[row])
    if top_k > 0:
        live[top_k:] = False
    limits = rows.top_p[row, None], rows.min_p[row, None]
    kept, logp = _renormalise(a_V[None], live[None], *limits, mass)
    if out.kept_mass is not None:
        out.kept_mass[row] = _kept_mass(a_V[None], kept, a_V[None])[0]
    ids, logp = order[kept[0]], logp[0][kept[0]]
    keys = (x[row] for x in (rows.seed, rows.position, rows.uid, rows.stream))
    noise = gumbel_noise(ids, *keys).to(a_V.dtype)
    # a, not log p: the same fp32 numbers are compared whatever way the sum of p was rounded.
    perturbed = a_V[kept[0]] + noise
    tied = perturbed == perturbed.max()
    winner = torch.where(tied, ids, len(z_V)).argmin()
    out.ids[row, 0] = ids[winner]
    out.logp[row, 0] = logp[winner]
    out.gprime[row, 0] = out.logp[row, 0] + noise[winner]


def _mass(a_BV: Tensor) -> Tensor:
    """[B, 1] fp64: total probability in units of the most probable token's."""
    a_BV = a_BV.double()
    return torch.exp(a_BV - a_BV.amax(-1, keepdim=True)).sum(-1, keepdim=True)


def _kept_mass(a_BK: Tensor, kept: Tensor, a_BV: Tensor) -> Tensor:
    """[B] fp64: probability of the kept slots under the softmax of a_BV."""
    kept_lse = a_BK.double().masked_fill(~kept, -torch.inf).logsumexp(-1)
    return torch.exp(kept_lse - a_BV.double().logsumexp(-1)).clamp(max=1.0)


def _renormalise(
    a_BK: Tensor, live: Tensor, top_p: Tensor, min_p: Tensor, mass: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Top-p and min-p within the live slots of a descending row: kept [B, K], log p [B, K] fp64.

    A slot is kept while the mass before it is < top_p of `mass` (None: of all live slots) and its
    p is >= min_p times the largest.
    """
    # fp64, so that no boundary depends on the order of a sum.
    top = a_BK[:, :1].double()
    ratio = torch.where(live, torch.exp(a_BK.double() - top), 0.0)
    total = ratio.sum(-1, keepdim=True) if mass is None else mass
    before = ratio.cumsum(-1).roll(1, -1)
    before[:, 0] = 0.0
    inside = (before / total < top_p[:, None]) | (top_p[:, None] >= 1)
    inside &= ratio >= min_p[:, None]
    inside[:, 0] = True
    kept = live & inside
    lse = top + torch.log(torch.where(kept, ratio, 0.0).sum(-1, keepdim=True))
    return kept, a_BK.double() - lse


def _sorted(values: Tensor, ids: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """(ids, values, *others) ordered by (value descending, id ascending) along the last axis."""
    by_id = ids.argsort(-1)
    order = values.gather(-1, by_id).argsort(dim=-1, descending=True, stable=True)
    order = by_id.gather(-1, order)
    return tuple(x.gather(-1, order) for x in (ids, values, *others))


def _write_statistics(out: SoftToken, z_BV: Tensor, rows: RowParameters, sampled: Tensor) -> None:
    """Log-sum-exp and entropy of the full vocabulary at the row's temperature (greedy: 1)."""
    temperature = torch.where(rows.mode == GREEDY, 1.0, rows.temperature)
    logp_BV = (z_BV / temperature[:, None]).double()
    lse = logp_BV.logsumexp(-1)
    logp_BV = logp_BV - lse[:, None]
    entropy = -torch.where(logp_BV > -torch.inf, logp_BV.exp() * logp_BV, 0.0).sum(-1)
    for place, value in ((out.lse, lse), (out.entropy, entropy)):
        if place is not None:
            place.copy_(value.masked_fill(~sampled, torch.nan))
