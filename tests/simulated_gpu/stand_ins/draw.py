"""From the first candidates of rows to their soft tokens, as `gpu.soft_token.draw`."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_kernels.row_parameters import RowParameters
from softgrpo_kernels.row_rules import SOFT

from .keys import NOTHING, key_of, token_of, value_of
from .memory import first, largest, rows_of, table_of
from .perturb import perturb
from .statistics import mapped


def head_logits(
    key: Tensor, live: Tensor, hidden: Tensor, hidden_stride: int, weight: Tensor,
    weight_stride: int, bias: Tensor | None, width: int, softcap: float, logit_scale: float,
    with_softcap: bool,
) -> Tensor:  # fmt: skip
    """fp32 logits [B, K] of the candidates from the last hidden states."""
    batch, slots = key.shape
    ids = torch.where(live, token_of(key), 0)
    w_MH = table_of(weight, weight_stride, width).index_select(0, ids.flatten()).float()
    x_BH = rows_of(hidden, batch, hidden_stride, width).float()
    dots = torch.bmm(w_MH.view(batch, slots, width), x_BH[..., None])[..., 0]
    biases = None if bias is None else first(bias, int(ids.max()) + 1)[ids]
    return mapped(dots, biases, softcap, logit_scale, with_softcap)


def vocabulary_sums(sums: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(maximum, mass, sum of exp(d) d, whether a logit is NaN or +inf) of every row."""
    m, s, weighted, bad = sums.unbind(-1)
    top = largest(m)
    d = torch.where(m > -torch.inf, m - top[:, None], -1000.0)
    factor = torch.exp(d)
    mass = (factor * s).sum(-1)
    entropy = (factor * (weighted + s * d)).sum(-1) if with_entropy else mass * 0.0
    return top, mass, entropy, (bad > 0.0).any(-1)


def sound(rows: RowParameters) -> Tensor:
    """Rows with nothing but allowed parameters."""
    try:
        rows.check()  # which is quick
    except ValueError:
        return rows.sound
    return torch.ones_like(rows.mode, dtype=torch.bool)


def drawn(
    z: Tensor, key: Tensor, live: Tensor, slot: Tensor, rows: RowParameters, mass: Tensor,
    joint: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(ids, g', log p) of the listed rows, in the order of g'; -1 and -inf in unused slots. And (a
    of the first candidate, mass of what is kept in its units)."""
    a = z / rows.temperature[:, None]
    key = key_of(a, token_of(key)).masked_fill_(~live, NOTHING).sort(descending=True).values
    token, a, live = token_of(key), value_of(key), key != NOTHING
    exact, used, kept_mass = _cut(a, live, slot, rows, mass if joint else None)
    g, ahead = perturb(exact, token, used, rows)
    rank = g if ahead is None else g.masked_fill(ahead, torch.inf)
    key = key_of(rank, token).masked_fill_(~used, NOTHING)
    key, order = key.sort(descending=True)
    free = key == NOTHING
    return (
        token_of(key).masked_fill_(free, -1),
        g.gather(1, order).masked_fill_(free, -torch.inf),
        exact.gather(1, order).masked_fill_(free, -torch.inf),
        a[:, 0],
        kept_mass,
    )


def _cut(
    a: Tensor, live: Tensor, slot: Tensor, rows: RowParameters, mass: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(log p, slots in use, mass of what is kept in units of the first) of descending rows after
    top-p, min-p and eps."""
    top_p = rows.top_p[:, None]
    dead = ~live
    best = a.masked_fill(dead, -torch.inf).amax(-1, keepdim=True)
    ratio = torch.exp(a - best).masked_fill_(dead, 0.0)
    wide = ratio.double()
    share = wide.sum(-1, keepdim=True) if mass is None else mass[:, None].double()
    before = wide.cumsum(-1) - wide
    kept = (before / share < top_p) | (top_p >= 1.0)
    kept = live & ((kept & (ratio >= rows.min_p[:, None])) | (slot == 0))
    kept_mass = (ratio * kept).sum(-1, keepdim=True)
    logp = a - best - torch.log(kept_mass)
    eps = torch.where(rows.mode == SOFT, rows.eps, 0.0)[:, None]
    used = kept
    if bool((eps > 0.0).any()):
        with_eps = torch.log(torch.exp(logp).masked_fill_(~kept, 0.0) + eps)
        used, logp = torch.where(eps > 0.0, live, kept), torch.where(eps > 0.0, with_eps, logp)
    return logp.masked_fill_(~used, 0.0), used, kept_mass[:, 0]


def weights_of(value: Tensor, token: Tensor, rows: RowParameters) -> Tensor:
    """softmax(g' / tau) of the slots within reach, in fp64 and one rounding."""
    power = (value / rows.tau[:, None]).double()
    beyond = value[:, :1].double() - value.double() > rows.reach[:, None]
    power = torch.exp(power - power.amax(-1, keepdim=True))
    power = power.masked_fill_((token < 0) | beyond, 0.0)
    return (power / power.sum(-1, keepdim=True)).float()
