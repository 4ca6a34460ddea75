"""A decode step of an engine on its record: the soft token of some rows, and their next inputs.

What `soft_token_of_rows` and `soft_embedding` do, between tables that stay where they are: on a GPU
the kernels read and write these themselves, in three launches, or four where a row may draw from
the whole vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softgrpo_kernels.backends import backend_of
from softgrpo_kernels.lm_head import LMHead
from softgrpo_kernels.record_tables import RecordTables
from softgrpo_kernels.row_parameters import RowParameters
from softgrpo_kernels.soft_embedding import soft_embedding
from softgrpo_kernels.soft_token import soft_token_of_rows
from softgrpo_kernels.soft_token_tensors import SoftTokenInputs
from softgrpo_kernels.soft_weights import weights_within


@torch.no_grad()
def draw_into_record(
    record: RecordTables,
    row_B: Tensor,
    step_B: Tensor,
    logits_BV: Tensor,
    drawn: Tensor,
    *,
    head: LMHead | None = None,
    unlisted: bool = True,
    backend: str = "auto",
) -> None:
    """Draws generated position step_B of rows row_B, each in its phase, and the phase that follows.

    Args:
        record: the tables; the position and the phase of these rows are overwritten.
        row_B, step_B: int64 [B].
        logits_BV: as for `soft_token`; unit stride in V.
        drawn: int64 [3, B], contiguous, overwritten: token, kind, valid of every row.
        head: with hidden states [B, H]: the candidates' logits are computed again in fp32.
        unlisted: False promises that no row draws discretely with a top_k <= 0 or > K: a row that
            does all the same draws nothing (token -1). Saves a launch.
        backend: see `soft_token`.
    """
    dtypes = [logits_BV.dtype] if head is None else [logits_BV.dtype, head.weight.dtype]
    if backend_of(backend, logits_BV.device, *dtypes) == "triton":
        from softgrpo_kernels.gpu import soft_token as gpu

        inputs = SoftTokenInputs(logits_BV, None, record.terminal_ids, head)
        gpu.draw_into_record(inputs, record, row_B, step_B, drawn, unlisted=unlisted)
        return
    of_head: dict[str, Any] = {}
    if head is not None:
        of_head = {**head._asdict(), "lm_head": head.weight}
        del of_head["weight"]
    result = soft_token_of_rows(
        logits_BV,
        record_parameters(record, row_B, step_B),
        terminal_ids=record.terminal_ids[row_B],
        **of_head,
        need_kept_mass=record.keeps_mass,
        backend=backend,
    )
    tables, places = record.drawn, (row_B, step_B)
    tables.ids[places] = result.ids
    tables.gprime[places] = result.gprime
    tables.kind[places] = result.kind
    tables.forced[places] = False
    tables.token[places] = result.token
    tables.logprob[places] = result.token_logp
    if result.kept_mass is not None:
        tables.kept_mass[places] = result.kept_mass
    record.soft[row_B] = result.kind
    torch.stack([result.token.long(), result.kind.long(), result.valid.long()], out=drawn)


def record_parameters(record: RecordTables, row_B: Tensor, step_B: Tensor) -> RowParameters:
    """How to draw generated position step_B of these rows, each in its phase."""
    column_B = record.soft[row_B].long() * len(record.soft) + row_B
    draws = record.draws
    floats, ints = (x.index_select(1, column_B) for x in (draws.floats, draws.ints))
    rows = RowParameters(floats, ints, record.drawn.ids.shape[2])
    rows.position.add_(step_B)
    return rows


@torch.no_grad()
def record_mixtures(
    record: RecordTables,
    row_T: Tensor,
    step_T: Tensor,
    embed: Tensor,
    *,
    before: int = 0,
    backend: str = "auto",
) -> Tensor:
    """What stands for generated positions: mixtures [T, H] of embed [V, H], in its dtype.

    row_T, step_T: int64 [T]; the positions are those so many `before` step_T.
    """
    if backend_of(backend, embed.device, embed.dtype) == "triton":
        from softgrpo_kernels.gpu.soft_token import mixture as gpu

        return gpu.record_mixtures(record, row_T, step_T, embed, before)
    places, columns = (row_T, step_T - before), len(record.soft) + row_T
    tau, reach = (x.index_select(0, columns) for x in (record.draws.tau, record.draws.reach))
    ids, gprime, kind = (table[places] for table in record.drawn[:3])
    return soft_embedding(ids, weights_within(gprime, kind, tau, reach), embed)
