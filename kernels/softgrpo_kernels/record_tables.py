"""The tables in which an engine keeps what its samples drew, and how they draw next."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from softgrpo_kernels.row_parameters import RowParameters


class RecordTables(NamedTuple):
    """R rows of C positions of K slots each, all contiguous and on one device.

    draws: parameters of 2 R columns, first of every row as it draws discretely, then softly; the
    position is that of its first generated token. soft: uint8 [R], 1 where the next position is
    drawn softly. terminal_ids: int32 [R, E], -1 pads: end the soft phase. Of every position: ids
    int32, gprime float32 [R, C, K]; kind uint8, forced bool, token int32, logprob float32 [R, C];
    kept_mass float32 [R, C], or [R, 0] where nobody asked for it. Meaning: `SoftToken`.
    """

    draws: RowParameters
    soft: Tensor
    terminal_ids: Tensor
    ids: Tensor
    gprime: Tensor
    kind: Tensor
    forced: Tensor
    token: Tensor
    logprob: Tensor
    kept_mass: Tensor

    @property
    def keeps_mass(self) -> bool:
        return self.kept_mass.shape[1] > 0
