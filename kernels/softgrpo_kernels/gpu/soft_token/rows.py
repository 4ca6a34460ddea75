"""The rows of a step as the kernels are given them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from softgrpo_kernels.record_tables import RecordTables
from softgrpo_kernels.row_parameters import RowParameters


class Rows(NamedTuple):
    """Tables of parameters, and where in them the rows of the batch stand.

    floats [9, columns], ints [7, columns]: see `RowParameters`; k_max: slots. places: (row, step,
    soft) of `gpu.soft_token.row.Places`, all None where row b of the batch is column b. unlisted:
    some row may draw from more than its slots.
    """

    floats: Tensor
    ints: Tensor
    k_max: int
    places: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    unlisted: bool = True

    @property
    def columns(self) -> int:
        return self.ints.shape[1]

    @staticmethod
    def of_batch(rows: RowParameters) -> Rows:
        """Rows that are the tables'."""
        return Rows(rows.floats, rows.ints, rows.k_max, unlisted=rows.may_be_unlisted)

    @staticmethod
    def of_record(record: RecordTables, row_B: Tensor, step_B: Tensor, unlisted: bool) -> Rows:
        """Rows of a record, int64 [B], at these generated positions, int64 [B]."""
        draws = record.draws
        places = (row_B, step_B, record.soft)
        return Rows(draws.floats, draws.ints, record.drawn.ids.shape[2], places, unlisted)
