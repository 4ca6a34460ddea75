"""The last launch of the soft step: what finishes a row, from its statistics to its soft token."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from softgrpo_kernels.gpu.rounding import rounded
from softgrpo_kernels.gpu.soft_token.draw import (
    Head,
    VocabularyRow,
    draw_from_slots,
    is_terminal,
    mixture_weights,
    top_candidates,
    vocabulary_sums,
)
from softgrpo_kernels.gpu.soft_token.full_vocabulary import Collected, draw_from_vocabulary
from softgrpo_kernels.gpu.soft_token.keys import NOTHING, token_of
from softgrpo_kernels.gpu.soft_token.mixture import BLOCK_H, mixture_of
from softgrpo_kernels.gpu.soft_token.row import (
    GREEDY,
    MODE,
    REACH,
    SKIP,
    SOFT,
    TAU,
    Places,
    float_of,
    int_of,
    is_listed,
    is_unlisted,
    row_of,
)
from softgrpo_kernels.gpu.soft_token.row_rules import row_is_sound
from softgrpo_kernels.gpu.soft_token.rows import Rows
from softgrpo_kernels.gpu.soft_token.statistics import COLUMNS, TILE
from softgrpo_kernels.lm_head import LMHead
from softgrpo_kernels.record_tables import RecordTables
from softgrpo_kernels.soft_token_tensors import SoftToken
from softgrpo_kernels.tensors import int32, unit_stride

_TILE = tl.constexpr(TILE)


class Statistics(NamedTuple):
    """What the launches before leave of logits [B, V]: see `vocabulary_statistics`, `collect`."""

    logits: Tensor
    tile_max: Tensor
    chunk_sums: Tensor
    collected: Collected | None


class Outputs(NamedTuple):
    """Where the results go; None: nowhere. From ids to logprob in rows of a record, where there is
    one, else of the batch, as the others are. soft: uint8 [R]; drawn: int64 [3, B]."""

    ids: Tensor
    gprime: Tensor
    kind: Tensor
    token: Tensor
    logprob: Tensor
    kept_mass: Tensor | None
    forced: Tensor | None = None
    drawn: Tensor | None = None
    weights: Tensor | None = None
    logp: Tensor | None = None
    n: Tensor | None = None
    embed: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    valid: Tensor | None = None

    @staticmethod
    def of_batch(out: SoftToken) -> Outputs:
        """The tensors of `soft_token`."""
        return Outputs(
            out.ids, out.gprime, out.kind, out.token, out.token_logp, out.kept_mass, None, None,
            out.weights, out.logp, out.n, out.embed, out.lse, out.entropy,
            out.valid.view(torch.uint8),
        )  # fmt: skip

    @staticmethod
    def of_record(record: RecordTables, drawn: Tensor) -> Outputs:
        """The tables of a record, and `drawn`."""
        ids, gprime, kind, forced, token, logprob, kept_mass = record.drawn
        return Outputs(
            ids, gprime, kind, token, logprob, kept_mass if record.keeps_mass else None,
            forced.view(torch.uint8), drawn,
        )  # fmt: skip


def sample(
    statistics: Statistics, rows: Rows, out: Outputs, *, capacity: int, terminal_ids: Tensor | None,
    head: LMHead | None, embed: Tensor | None, joint: bool,
) -> None:  # fmt: skip
    """Draws and writes every row. capacity: positions of a row of the record, or 1."""
    logits, tile_max, chunk_sums, collected = statistics
    batch, vocabulary = logits.shape
    tiles, chunks = tile_max.shape[1], chunk_sums.shape[1]
    ends = 0 if terminal_ids is None else terminal_ids.shape[1]
    terminal_ids = None if terminal_ids is None or not ends else int32(terminal_ids)
    hidden = weight = bias = None
    if head is not None:
        hidden, weight = unit_stride(head.hidden), unit_stride(head.weight)
        bias = None if head.bias is None else head.bias.contiguous()
    table = None if embed is None else unit_stride(embed)
    k = triton.next_power_of_2(max(rows.k_max, 2))
    sample_kernel[(batch,)](
        logits, logits.stride(0), vocabulary, tile_max, tiles, chunk_sums, chunks,
        *(collected or (None,) * 5), rows.floats, rows.ints, rows.columns, rows.k_max,
        *rows.places, capacity, terminal_ids, ends,
        hidden, 0 if hidden is None else hidden.stride(0),
        weight, 0 if weight is None else weight.stride(0), bias,
        0 if weight is None else weight.shape[1],
        float((head and head.softcap) or 0.0), float(head.logit_scale if head else 1.0),
        table, 0 if table is None else table.stride(0), 0 if table is None else table.shape[1],
        *out,
        K=k, TILES=max(triton.next_power_of_2(tiles), k), CHUNKS=triton.next_power_of_2(chunks),
        # (Of every number of ids the compiler would make a kernel of its own.)
        TERMINALS=triton.next_power_of_2(ends),
        SOFTCAP=head is not None and head.softcap is not None, JOINT=joint,
        # Whatever is collected: the warps decide in which order sums are added, and the bits of a
        # row must not depend on what the others draw from.
        BLOCK_H=BLOCK_H, num_warps=8 if k <= 16 else 16,
        enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tiles", "chunks", "columns", "k_max", "capacity", "terminal_width"])
def sample_kernel(
    logits, stride, vocabulary, tile_max, tiles, chunk_sums, chunks, best, listed_a, listed_id,
    count, histogram, floats, ints, columns, k_max, at_row, at_step, phases, capacity, terminal_ids,
    terminal_width, hidden, hidden_stride, weight, weight_stride, bias, width, softcap, logit_scale,
    table, table_stride, table_width, out_ids, out_gprime, out_kind, out_token, out_logprob,
    out_kept_mass, out_forced, out_drawn, out_weights, out_logp, out_n, out_embed, out_lse,
    out_entropy, out_valid,
    K: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr, TERMINALS: tl.constexpr,
    SOFTCAP: tl.constexpr, JOINT: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Program b: everything of row b that follows from its statistics."""
    index = tl.program_id(0).to(tl.int64)
    row = row_of(index, floats, ints, columns, k_max, Places(at_row, at_step, phases))
    chunk_sums += index * chunks * COLUMNS
    vocabulary_row = VocabularyRow(
        logits + index * stride, vocabulary, tile_max + index * tiles, tiles, chunk_sums, chunks
    )
    head = Head(
        hidden, index * hidden_stride, weight, weight_stride, bias, width, softcap, logit_scale
    )
    collected = Collected(best, listed_a, listed_id, count, histogram)
    mode, slot = int_of(row, MODE), tl.arange(0, K)
    valid, soft = mode == SKIP, mode == SOFT
    token, gprime = tl.full([K], -1, tl.int32), tl.full([K], -float("inf"), tl.float32)
    logp, weights = gprime, tl.zeros([K], tl.float32)
    lse, entropy, kept_mass = float("nan"), float("nan"), float("nan")
    key = tl.full([K], NOTHING, tl.int64)
    # Not under `valid`: of that the assembler cannot know that all threads agree, and it writes
    # every shuffle of the network twice.
    if (mode == GREEDY) | is_listed(row):
        key = top_candidates(vocabulary_row, K, TILES, _TILE)
    if mode != SKIP:
        sums = vocabulary_sums(chunk_sums, chunks, CHUNKS, out_entropy is not None)
        # (A logit divided by the temperature may be +inf.)
        valid = (sums.bad == 0) & (tl.abs(sums.top) < float("inf")) & row_is_sound(row)
        lse = tl.where(valid, sums.top + tl.log(sums.mass), lse)
        entropy = tl.where(valid, tl.log(sums.mass) - sums.weighted / sums.mass, entropy)
        if valid & (mode == GREEDY):
            token = tl.where(slot == 0, token_of(key), -1)
            logp = tl.where(slot == 0, 0.0 - tl.log(sums.mass), -float("inf"))
            gprime = logp
            kept_mass = 1.0
        if valid & is_listed(row):
            token, gprime, logp, kept_mass = draw_from_slots(
                key, slot, row, head, sums, K, 64, SOFTCAP, JOINT
            )
        if count is not None:  # noqa: SIM102 (the compiler's, the next one the device's)
            if valid & is_unlisted(row):
                token, gprime, logp, kept_mass = draw_from_vocabulary(
                    row, index, slot, vocabulary_row, collected, CHUNKS, JOINT
                )

    n = tl.sum((token >= 0).to(tl.int32), axis=0)
    first = tl.sum(tl.where(slot == 0, token, 0), axis=0)
    first = tl.where(n > 0, first, -1)
    soft = soft & (n > 0)
    at = index
    if at_row is not None:
        at = tl.load(at_row + index)
    if TERMINALS > 0:
        ends = terminal_ids + at * terminal_width
        soft = soft & (is_terminal(first, ends, terminal_width, TERMINALS) == 0)
    if out_weights is not None:
        if soft:
            weights = mixture_weights(gprime, token, float_of(row, TAU), float_of(row, REACH))
        elif n > 0:
            weights = tl.where(slot == 0, 1.0, 0.0)

    place = at * capacity + row.step
    inside = slot < k_max
    tl.store(out_ids + place * k_max + slot, token, mask=inside)
    tl.store(out_gprime + place * k_max + slot, gprime, mask=inside)
    tl.store(out_kind + place, soft.to(tl.uint8))
    tl.store(out_token + place, first)
    tl.store(out_logprob + place, tl.max(tl.where(slot == 0, logp, -float("inf")), axis=0))
    if out_kept_mass is not None:
        tl.store(out_kept_mass + place, tl.where(soft, float("nan"), kept_mass))
    if out_forced is not None:
        tl.store(out_forced + place, 0)
    if out_drawn is not None:
        batch = tl.num_programs(0)
        tl.store(out_drawn + index, first.to(tl.int64))
        tl.store(out_drawn + batch + index, soft.to(tl.int64))
        tl.store(out_drawn + 2 * batch + index, valid.to(tl.int64))
    if out_weights is not None:
        tl.store(out_weights + index * k_max + slot, weights, mask=inside)
        tl.store(out_logp + index * k_max + slot, logp, mask=inside)
        tl.store(out_n + index, n)
        tl.store(out_valid + index, valid.to(tl.uint8))
    if out_lse is not None:
        tl.store(out_lse + index, lse)
    if out_entropy is not None:
        tl.store(out_entropy + index, entropy)
    if out_embed is not None:
        for begin in range(0, table_width, BLOCK_H):
            h = begin + tl.arange(0, BLOCK_H)
            mixed = mixture_of(token, weights, slot, n, table, table_stride, h, table_width)
            mixed = rounded(mixed, out_embed.dtype.element_ty)
            tl.store(out_embed + index * table_width + h, mixed, mask=h < table_width)
    if phases is not None:
        # Behind all that read it: a warp may still be at the beginning.
        tl.debug_barrier()
        tl.store(phases + at, soft.to(tl.uint8))
