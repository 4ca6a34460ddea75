"""Stand-in for the kernel of `softgrpo_kernels.gpu.soft_token.draw`."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_kernels.row_parameters import RowParameters
from softgrpo_kernels.row_rules import GREEDY, SKIP, SOFT

from .keys import NOTHING, key_of, token_of, value_of
from .memory import first, largest, parameters, rows_of, table_of
from .perturb import perturb
from .statistics import mapped

Grid = tuple[int, ...]


def draw_kernel(
    grid: Grid,
    keys: Tensor,
    chunk_sums: Tensor,
    chunks: int,
    floats: Tensor,
    ints: Tensor,
    batch: int,
    terminal_ids: Tensor | None,
    terminal_width: int,
    hidden: Tensor | None,
    hidden_stride: int,
    weight: Tensor | None,
    weight_stride: int,
    bias: Tensor | None,
    width: int,
    softcap: float,
    logit_scale: float,
    out_ids: Tensor,
    out_gprime: Tensor,
    out_weights: Tensor,
    out_logp: Tensor,
    out_n: Tensor,
    out_token: Tensor,
    out_token_logp: Tensor,
    out_kind: Tensor,
    out_lse: Tensor | None,
    out_entropy: Tensor | None,
    out_kept_mass: Tensor | None,
    out_valid: Tensor,
    k_max: int,
    K: int,
    CHUNKS: int,
    TERMINALS: int,
    HEAD: bool,
    BIAS: bool,
    SOFTCAP: bool,
    JOINT: bool,
    LSE: bool,
    ENTROPY: bool,
    KEPT_MASS: bool,
) -> None:
    assert grid == (batch,)
    assert chunks <= CHUNKS
    assert k_max <= K
    rows = parameters(floats, ints, batch, k_max)
    skip, soft = rows.mode == SKIP, rows.mode == SOFT
    sums = first(chunk_sums, batch * chunks * 4).view(batch, chunks, 4)
    top, mass, weighted, bad = _vocabulary_sums(sums, ENTROPY)
    sampled = ~skip & ~bad & (top > -torch.inf) & _sound(rows)
    log_mass, listed = torch.log(mass), sampled & rows.listed
    greedy = (sampled & (rows.mode == GREEDY))[:, None]

    slot = torch.arange(K)
    key = rows_of(keys, batch, K, K).masked_fill(~(listed[:, None] | greedy), NOTHING)
    token, value, logp = torch.full_like(key, -1), *torch.full((2, batch, K), -torch.inf)
    kept_mass = torch.where(greedy[:, 0], 1.0, torch.nan)
    if bool(listed.any()):
        live = listed[:, None] & (slot < rows.top_k[:, None]) & (key != NOTHING)
        z = value_of(key)
        if HEAD:
            assert hidden is not None
            assert weight is not None
            ids = torch.where(live, token_of(key), 0)
            w_MH = table_of(weight, weight_stride, width).index_select(0, ids.flatten()).float()
            x_BH = rows_of(hidden, batch, hidden_stride, width).float()
            dots = torch.bmm(w_MH.view(batch, K, width), x_BH[..., None])[..., 0]
            biases = None
            if BIAS:
                assert bias is not None
                biases = first(bias, int(ids.max()) + 1)[ids]
            z = mapped(dots, biases, softcap, logit_scale, SOFTCAP)
        token, value, logp, best, kept = _drawn(z, key, live, slot, rows, mass, JOINT)
        if KEPT_MASS:
            a, before = (x / rows.temperature[:, None] - top[:, None] for x in (z, value_of(key)))
            change = (torch.exp(a) - torch.exp(before)).masked_fill(~live, 0.0).sum(-1)
            kept = kept * torch.exp(best - top)
            share = kept / torch.maximum(mass + change if HEAD else mass, kept)
            kept_mass = torch.where(listed, share, kept_mass)
    if bool(greedy.any()):
        head_of_row = greedy & (slot == 0)
        token = torch.where(head_of_row, token_of(key), token)
        value, logp = (torch.where(head_of_row, -log_mass[:, None], x) for x in (value, logp))

    n = (token >= 0).sum(-1)
    soft = soft & (n > 0)
    if TERMINALS:
        assert terminal_ids is not None
        ends = rows_of(terminal_ids, batch, terminal_width, min(TERMINALS, terminal_width))
        soft = soft & (ends != token[:, :1]).all(-1)
    weights = ((n > 0)[:, None] & (slot == 0)).float()
    if bool(soft.any()):
        weights = torch.where(soft[:, None], _weights(value, token, rows), weights)

    for target, x in (
        (out_ids, token), (out_gprime, value), (out_weights, weights), (out_logp, logp),
    ):  # fmt: skip
        rows_of(target, batch, k_max, k_max).copy_(x[:, :k_max])
    valid = sampled | skip
    for target, x in (
        (out_n, n), (out_token, token[:, 0]), (out_token_logp, logp[:, 0]), (out_kind, soft),
        (out_valid, valid),
    ):  # fmt: skip
        first(target, batch).copy_(x)
    if LSE:
        assert out_lse is not None
        first(out_lse, batch).copy_(torch.where(sampled, top + log_mass, torch.nan))
    if ENTROPY:
        assert out_entropy is not None
        entropy = torch.where(sampled, log_mass - weighted / mass, torch.nan)
        first(out_entropy, batch).copy_(entropy)
    if KEPT_MASS:
        assert out_kept_mass is not None
        first(out_kept_mass, batch).copy_(kept_mass.masked_fill(soft, torch.nan))


def _vocabulary_sums(sums: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(maximum, mass, sum of exp(d) d, whether a logit is NaN or +inf) of every row."""
    m, s, weighted, bad = sums.unbind(-1)
    top = largest(m)
    d = torch.where(m > -torch.inf, m - top[:, None], -1000.0)
    factor = torch.exp(d)
    mass = (factor * s).sum(-1)
    entropy = (factor * (weighted + s * d)).sum(-1) if with_entropy else mass * 0.0
    return top, mass, entropy, (bad > 0.0).any(-1)


def _sound(rows: RowParameters) -> Tensor:
    """Rows with nothing but allowed parameters."""
    try:
        rows.check()  # which is quick
    except ValueError:
        return rows.sound
    return torch.ones_like(rows.mode, dtype=torch.bool)


def _drawn(
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


def _weights(value: Tensor, token: Tensor, rows: RowParameters) -> Tensor:
    """softmax(g' / tau) of the slots within reach, in fp64 and one rounding."""
    power = (value / rows.tau[:, None]).double()
    beyond = value[:, :1].double() - value.double() > rows.reach[:, None]
    power = torch.exp(power - power.amax(-1, keepdim=True))
    power = power.masked_fill_((token < 0) | beyond, 0.0)
    return (power / power.sum(-1, keepdim=True)).float()
