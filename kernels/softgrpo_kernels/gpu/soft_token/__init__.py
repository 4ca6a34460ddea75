"""One soft step in Triton.

The statistics kernel reads the logits once (or the LM head's leaves them with their statistics); a
second one finishes every row: it finds the candidates, in the tiles that can hold any, from the
cache, draws, and mixes the embeddings or writes the record of an engine. Where rows may draw from
the whole vocabulary, one between them prepares these. Nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_kernels.gpu.soft_token.full_vocabulary import collect
from softgrpo_kernels.gpu.soft_token.lm_head import MOST_ROWS, lm_head_statistics
from softgrpo_kernels.gpu.soft_token.rows import Rows
from softgrpo_kernels.gpu.soft_token.sample import Outputs, Statistics, sample
from softgrpo_kernels.gpu.soft_token.statistics import BINS, NO_LISTS, vocabulary_statistics
from softgrpo_kernels.lm_head import LMHead
from softgrpo_kernels.record_tables import RecordTables
from softgrpo_kernels.row_parameters import RowParameters
from softgrpo_kernels.soft_token_tensors import SoftToken, SoftTokenInputs
from softgrpo_kernels.tensors import unit_stride


def soft_token(inputs: SoftTokenInputs, rows: RowParameters, out: SoftToken) -> None:
    """See `softgrpo_kernels.reference.soft_token`; float32, bfloat16 or float16. Without logits
    they are computed from the head."""
    logits, embed, terminal_ids, head, joint = inputs
    if not len(out.token):
        return
    of_batch = Rows.of_batch(rows)
    statistics = _statistics(logits, head, of_batch, need_entropy=out.entropy is not None)
    sample(
        statistics, of_batch, Outputs.of_batch(out), capacity=1, terminal_ids=terminal_ids,
        head=head, embed=embed, joint=joint,
    )  # fmt: skip


def draw_into_record(
    inputs: SoftTokenInputs,
    record: RecordTables,
    row_B: Tensor,
    step_B: Tensor,
    drawn: Tensor,
    *,
    unlisted: bool,
) -> None:
    """See `softgrpo_kernels.record_step.draw_into_record`."""
    if not len(row_B):
        return
    rows = Rows.of_record(record, row_B, step_B, unlisted)
    statistics = _statistics(inputs.logits, inputs.head, rows, need_entropy=False)
    sample(
        statistics, rows, Outputs.of_record(record, drawn), capacity=record.drawn.ids.shape[1],
        terminal_ids=record.terminal_ids, head=inputs.head, embed=None, joint=inputs.joint,
    )  # fmt: skip


def _statistics(
    logits: Tensor | None, head: LMHead | None, rows: Rows, *, need_entropy: bool
) -> Statistics:
    """Of the logits or, without them, of those of the head: all launches but the last."""
    lists = NO_LISTS
    if rows.unlisted:
        source = logits if head is None else head.hidden
        assert source is not None
        lists = (
            torch.empty(len(source), dtype=torch.int32, device=source.device),
            torch.empty((len(source), BINS.value), dtype=torch.int64, device=source.device),
        )
    if logits is None and head is not None and len(head.hidden) <= MOST_ROWS:
        logits, tile_max, chunk_sums = lm_head_statistics(
            head, rows, need_entropy=need_entropy, lists=lists
        )
    else:
        if logits is None:
            assert head is not None
            logits = head.logits()
        logits = unit_stride(logits)
        tile_max, chunk_sums = vocabulary_statistics(
            logits, rows, need_entropy=need_entropy, lists=lists
        )
    collected = collect(logits, chunk_sums, rows, *lists) if rows.unlisted else None
    return Statistics(logits, tile_max, chunk_sums, collected)
