"""The tables in which an engine keeps what its samples drew, and how they draw next."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from softgrpo_kernels.row_parameters import RowParameters


class Drawn(NamedTuple):
    """What was drawn at C positions of R rows, all contiguous and on one device.

    ids: int32, gprime: float32 [R, C, K]. kind: uint8, forced: bool, token: int32, logprob: float32
    [R, C], log p of the token. kept_mass: float32 [R, C], or [R, 0] where nobody has asked for it.
    Meaning: `SoftToken`; forced: nobody chose the token.
    """

    ids: Tensor
    gprime: Tensor
    kind: Tensor
    forced: Tensor
    token: Tensor
    logprob: Tensor
    kept_mass: Tensor

    @staticmethod
    def empty(
        rows: int, capacity: int, candidates: int, device: torch.device, kept_mass: bool = False
    ) -> Drawn:
        """Room in which nothing is drawn yet."""
        shape = (rows, capacity)
        return Drawn(
            ids=torch.full((*shape, candidates), -1, dtype=torch.int32, device=device),
            gprime=torch.full((*shape, candidates), -torch.inf, device=device),
            kind=torch.zeros(shape, dtype=torch.uint8, device=device),
            forced=torch.zeros(shape, dtype=torch.bool, device=device),
            token=torch.zeros(shape, dtype=torch.int32, device=device),
            logprob=torch.zeros(shape, device=device),
            kept_mass=torch.full((rows, capacity * kept_mass), torch.nan, device=device),
        )


class RecordTables(NamedTuple):
    """R rows and what they drew.

    draws: parameters of 2 R columns, first of every row as it draws discretely, then softly; the
    position is that of its first generated token. soft: uint8 [R], 1 where the next position is
    drawn softly. terminal_ids: int32 [R, E], -1 pads: end the soft phase.
    """

    draws: RowParameters
    soft: Tensor
    terminal_ids: Tensor
    drawn: Drawn

    @property
    def keeps_mass(self) -> bool:
        return self.drawn.kept_mass.shape[1] > 0
