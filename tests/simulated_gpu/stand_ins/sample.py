"""Stand-in for the kernel of `softgrpo_kernels.gpu.soft_token.sample`."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_kernels.gpu.soft_token.statistics import TILE
from softgrpo_kernels.row_rules import GREEDY, SKIP, SOFT

from .draw import drawn, head_logits, sound, vocabulary_sums, weights_of
from .full_vocabulary import draw_unlisted
from .keys import NOTHING, token_of, value_of
from .memory import first, flat, parameters_at, rows_of
from .select import top_candidates
from .soft_embedding import mixtures

Grid = tuple[int, ...]


def sample_kernel(
    grid: Grid,
    logits: Tensor,
    stride: int,
    vocabulary: int,
    tile_max: Tensor,
    tiles: int,
    chunk_sums: Tensor,
    chunks: int,
    best: Tensor | None,
    listed_a: Tensor | None,
    listed_id: Tensor | None,
    count: Tensor | None,
    histogram: Tensor | None,
    floats: Tensor,
    ints: Tensor,
    columns: int,
    k_max: int,
    at_row: Tensor | None,
    at_step: Tensor | None,
    phases: Tensor | None,
    capacity: int,
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
    table: Tensor | None,
    table_stride: int,
    table_width: int,
    out_ids: Tensor,
    out_gprime: Tensor,
    out_kind: Tensor,
    out_token: Tensor,
    out_logprob: Tensor,
    out_kept_mass: Tensor | None,
    out_forced: Tensor | None,
    out_drawn: Tensor | None,
    out_weights: Tensor | None,
    out_logp: Tensor | None,
    out_n: Tensor | None,
    out_embed: Tensor | None,
    out_lse: Tensor | None,
    out_entropy: Tensor | None,
    out_valid: Tensor | None,
    K: int,
    TILES: int,
    CHUNKS: int,
    TERMINALS: int,
    SOFTCAP: bool,
    JOINT: bool,
    BLOCK_H: int,
) -> None:
    (batch,) = grid
    assert chunks <= CHUNKS
    assert k_max <= K
    rows = parameters_at(batch, floats, ints, columns, k_max, at_row, at_step, phases)
    skip, soft = rows.mode == SKIP, rows.mode == SOFT
    sums = first(chunk_sums, batch * chunks * 4).view(batch, chunks, 4)
    top, mass, weighted, bad = vocabulary_sums(sums, out_entropy is not None)
    sampled = ~skip & ~bad & top.isfinite() & sound(rows)
    log_mass, listed = torch.log(mass), sampled & rows.listed
    greedy = sampled & (rows.mode == GREEDY)

    slot = torch.arange(K)
    key = top_candidates(
        logits, stride, vocabulary, tile_max, tiles, listed | greedy, K, TILES, TILE
    )
    token, value, logp = torch.full_like(key, -1), *torch.full((2, batch, K), -torch.inf)
    kept_mass = torch.where(greedy, 1.0, torch.nan)
    if bool(listed.any()):
        live = listed[:, None] & (slot < rows.top_k[:, None]) & (key != NOTHING)
        z = value_of(key)
        if hidden is not None:
            assert weight is not None
            z = head_logits(
                key, live, hidden, hidden_stride, weight, weight_stride, bias, width, softcap,
                logit_scale, SOFTCAP,
            )  # fmt: skip
        token, value, logp, first_a, kept = drawn(z, key, live, slot, rows, mass, JOINT)
        a, before = (x / rows.temperature[:, None] - top[:, None] for x in (z, value_of(key)))
        change = (torch.exp(a) - torch.exp(before)).masked_fill(~live, 0.0).sum(-1)
        kept = kept * torch.exp(first_a - top)
        share = kept / torch.maximum(mass if hidden is None else mass + change, kept)
        kept_mass = torch.where(listed, share, kept_mass)
    if bool(greedy.any()):
        head_of_row = greedy[:, None] & (slot == 0)
        token = torch.where(head_of_row, token_of(key), token)
        value, logp = (torch.where(head_of_row, -log_mass[:, None], x) for x in (value, logp))
    unlisted = (sampled & rows.unlisted).nonzero()[:, 0]
    if count is not None and len(unlisted):
        assert best is not None
        assert listed_a is not None
        assert listed_id is not None
        found = draw_unlisted(
            unlisted, rows, logits, stride, vocabulary, best, listed_a, listed_id, count,
            chunk_sums, chunks, JOINT,
        )  # fmt: skip
        for target, x in zip((token, value, logp), found, strict=False):
            target[unlisted, 0] = x
        kept_mass[unlisted] = found[3]

    n = (token >= 0).sum(-1)
    at = torch.arange(batch) if at_row is None else first(at_row, batch)
    soft = soft & (n > 0)
    if TERMINALS:
        assert terminal_ids is not None
        ends = rows_of(terminal_ids, int(at.max()) + 1, terminal_width, terminal_width)[at]
        soft = soft & (ends[:, :TERMINALS] != token[:, :1]).all(-1)
    place = at if at_step is None else at * capacity + first(at_step, batch)
    slots = place[:, None] * k_max + slot[:k_max]
    for target, x in ((out_ids, token), (out_gprime, value)):
        flat(target)[slots] = x[:, :k_max].to(target.dtype)
    for out, x in (
        (out_kind, soft), (out_token, token[:, 0]), (out_logprob, logp[:, 0]),
        (out_kept_mass, kept_mass.masked_fill(soft, torch.nan)),
        (out_forced, torch.zeros_like(soft)),
    ):  # fmt: skip
        if out is not None:
            flat(out)[place] = x.to(out.dtype)
    valid = sampled | skip
    if out_drawn is not None:
        first(out_drawn, 3 * batch).copy_(torch.stack((token[:, 0], soft, valid)).flatten())
    weights = ((n > 0)[:, None] & (slot == 0)).float()
    if bool(soft.any()):
        weights = torch.where(soft[:, None], weights_of(value, token, rows), weights)
    entropy = torch.where(sampled, log_mass - weighted / mass, torch.nan)
    for out, x in (
        (out_weights, weights[:, :k_max]), (out_logp, logp[:, :k_max]), (out_n, n),
        (out_valid, valid), (out_lse, torch.where(sampled, top + log_mass, torch.nan)),
        (out_entropy, entropy),
    ):  # fmt: skip
        if out is not None:
            first(out, x.numel()).copy_(x.flatten())
    if out_embed is not None:
        assert table is not None
        mixed = mixtures(token, weights, table, table_stride, table_width)
        first(out_embed, mixed.numel()).copy_(mixed.flatten())
    if phases is not None:
        flat(phases)[at] = soft.to(torch.uint8)
