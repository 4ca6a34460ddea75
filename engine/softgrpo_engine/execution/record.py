"""The device's memory of running samples: what was drawn, and how to draw next."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from softgrpo_engine.scheduling.sequence import Sequence
from softgrpo_engine.soft_tokens import SoftTokens
from softgrpo_engine.transfer import ToHost, to_device
from softgrpo_kernels import RowParameters
from softgrpo_kernels.lm_head import LMHead
from softgrpo_kernels.methods import method_of
from softgrpo_kernels.record_step import draw_into_record, record_mixtures
from softgrpo_kernels.record_tables import Drawn, RecordTables
from softgrpo_kernels.row_rules import (
    DISCRETE,
    FLOAT_COLUMNS,
    GREEDY,
    INT_COLUMNS,
    SKIP,
    SOFT,
    RowValues,
)
from softgrpo_kernels.soft_weights import weight_reach


class Record:
    """Rows of samples: parameters, and the SoftTokens of every generated position.

    A sample keeps its row while it is preempted; its inputs are rebuilt from here alone. Tables
    grow with the longest answer and the most candidates that were asked for, and hold kept masses
    once somebody has asked for them.

    draws: RowParameters of 2 rows columns, first of every row as it draws discretely, then softly;
    the position is that of its first new token. soft: uint8 [rows], 1 where the next
    position is drawn softly.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows, self.device = rows, device
        self.capacity = self.candidates = 0
        self.keeps_mass = False
        self.drawn = Drawn.empty(rows, 0, 0, device)
        self.draws = RowParameters(
            torch.zeros(len(FLOAT_COLUMNS), 2 * rows, device=device),
            torch.zeros(len(INT_COLUMNS), 2 * rows, dtype=torch.int64, device=device),
            k_max=0,
        )
        self.soft = torch.zeros(rows, dtype=torch.uint8, device=device)
        self.terminal_ids = torch.empty(rows, 0, dtype=torch.int32, device=device)
        self._reader = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._changed: torch.cuda.Event | None = None  # outside of a step

    def reserve(self, capacity: int, candidates: int, kept_mass: bool = False) -> None:
        """Makes room for ``capacity`` positions of ``candidates`` slots, and their kept mass,
        keeping what is there."""
        new_mass = kept_mass and not self.keeps_mass
        if capacity <= self.capacity and candidates <= self.candidates and not new_mass:
            return
        sizes = max(capacity, self.capacity), max(candidates, self.candidates)
        keeps_mass = self.keeps_mass or kept_mass
        drawn = Drawn.empty(self.rows, *sizes, self.device, keeps_mass)
        for target, source in zip(drawn, self.drawn, strict=True):
            target[tuple(slice(size) for size in source.shape)] = source
        # Only now: where there was no memory for it, the sizes must still be those of the tables.
        self.drawn, self.keeps_mass = drawn, keeps_mass
        self.capacity, self.candidates = sizes
        self._mark_changed()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of it."""
        return (*self.drawn, self.draws.floats, self.draws.ints, self.soft, self.terminal_ids)

    def skip(self, row: int) -> None:
        """Nothing is drawn in this row: it pads batches."""
        for column in (row, self.rows + row):
            self.draws.floats[:, column] = 1.0
            self.draws.mode[column] = SKIP

    def start(self, sequences: Seq[Sequence]) -> None:
        """Writes the parameters of samples that just got their rows."""
        if not sequences:
            return
        rows = [sequence.row for sequence in sequences if sequence.row is not None]
        settings = [discrete_values(sequence) for sequence in sequences]
        columns = list(rows)
        for sequence, row in zip(sequences, rows, strict=True):
            if sequence.soft is not None:
                columns.append(self.rows + row)
                settings.append(soft_values(sequence))
        at = self._to_device(columns)
        self.draws.floats[:, at] = self._to_device([v.floats for v in settings], np.float32).T
        self.draws.ints[:, at] = self._to_device([v.ints for v in settings]).T
        at = self._to_device(rows)
        self.soft[at] = self._to_device([s.soft is not None for s in sequences], np.uint8)
        self._set_terminal_ids(at, [s.terminal_ids for s in sequences])

    def _to_device(self, values: Seq[object], dtype: type = np.int64) -> Tensor:
        return to_device(np.array(values, dtype=dtype), self.device)

    def _set_terminal_ids(self, rows: Tensor, ids: Seq[Seq[int]]) -> None:
        width, needed = self.terminal_ids.shape[1], max(map(len, ids))
        if needed > width:
            more = self.terminal_ids.new_full((self.rows, needed - width), -1)
            self.terminal_ids = torch.cat([self.terminal_ids, more], dim=1)
        width = self.terminal_ids.shape[1]
        padded = [[*row, *[-1] * (width - len(row))] for row in ids]
        if width:
            self.terminal_ids[rows] = self._to_device(padded, np.int32)

    @property
    def tables(self) -> RecordTables:
        """What the kernels read and write."""
        return RecordTables(self.draws, self.soft, self.terminal_ids, self.drawn)

    def draw(
        self,
        rows_B: Tensor,
        index_B: Tensor,
        logits_BV: Tensor,
        drawn: Tensor,
        head: LMHead,
        unlisted: bool,
    ) -> None:
        """Draws generated position index_B of these rows, each in its phase, and keeps it and the
        phase that follows; see `draw_into_record`."""
        draw_into_record(
            self.tables, rows_B, index_B, logits_BV, drawn, head=head, unlisted=unlisted
        )

    def mixtures(self, rows_T: Tensor, index_T: Tensor, embed: Tensor, before: int) -> Tensor:
        """What stands for generated positions index_T - before, [T, H]: mixtures of the table of
        embeddings."""
        return record_mixtures(self.tables, rows_T, index_T, embed, before=before)

    def force(self, row: int, index: int, token: int) -> None:
        """Puts ``token`` at a position already drawn; the phase is discrete from here."""
        drawn = self.drawn
        drawn.ids[row, index].fill_(-1)
        drawn.ids[row, index, 0].fill_(token)
        drawn.gprime[row, index].fill_(-torch.inf)
        drawn.gprime[row, index, 0].fill_(0.0)
        drawn.kind[row, index].fill_(0)
        drawn.forced[row, index].fill_(True)
        drawn.token[row, index].fill_(token)
        drawn.logprob[row, index].fill_(0.0)
        if self.keeps_mass:
            drawn.kept_mass[row, index].fill_(1.0)
        self.set_soft_phase(row, False)
        self._mark_changed()

    def set_soft_phase(self, row: int, soft: bool) -> None:
        """How the next position of the row is drawn."""
        self.soft[row].fill_(soft)

    def _mark_changed(self) -> None:
        if self._reader is not None:
            self._changed = torch.cuda.Event()
            self._changed.record()

    def noise_keys(self, rows_T: Tensor, index_T: Tensor) -> tuple[Tensor, ...]:
        """Seed, position, uid, stream of the noise on generated positions, each int64 [T]."""
        draws, columns = self.draws, self.rows + rows_T
        seed, position, uid, stream = (
            key.index_select(0, columns)
            for key in (draws.seed, draws.position, draws.uid, draws.stream)
        )
        return seed, position + index_T, uid, stream

    def soft_tokens(
        self, sequences: Seq[Sequence]
    ) -> list[tuple[SoftTokens, Tensor, Tensor | None]]:
        """The records of samples so far [T, slots], their log-probabilities [T], and their kept
        masses [T] where they asked for them, copied.

        One wait for all of them: for what the host has read of them already, not for the step under
        way, which only adds positions.
        """
        if not sequences:
            return []
        # A sample that never ran has no row, and nothing in it.
        rows = [sequence.row or 0 for sequence in sequences]
        lengths = [len(sequence.tokens) for sequence in sequences]
        places = [row * self.capacity + np.arange(n) for row, n in zip(rows, lengths, strict=True)]
        if self._reader is None:
            words = self._words(np.concatenate(places))
        else:
            if self._changed is not None:
                self._reader.wait_event(self._changed)
            with torch.cuda.stream(self._reader):
                words = ToHost(self._words(np.concatenate(places))).wait()
        return [
            _unpacked(part, self.candidates, sequence)
            for part, sequence in zip(words.split(lengths), sequences, strict=True)
        ]

    def _words(self, places: np.ndarray) -> Tensor:
        """What is recorded at flat places, as one table int32 [T, 2 K + 4, or 5 with the mass]."""
        at = to_device(places, self.device)
        kept = [part for part in self.drawn if part.shape[1]]
        columns = [part.flatten(0, 1).index_select(0, at) for part in kept]
        columns = [c.view(torch.int32) if c.is_floating_point() else c for c in columns]
        return torch.cat(
            [c.int().view(len(at), c.shape[1] if c.dim() > 1 else 1) for c in columns], dim=1
        )


def _unpacked(
    words: Tensor, candidates: int, sequence: Sequence
) -> tuple[SoftTokens, Tensor, Tensor | None]:
    """A sample's rows of `Record._words`; tensors of their own."""
    slots = sequence.slots
    ids, gprime = words[:, : 2 * candidates].split(candidates, dim=1)
    columns = [column.clone() for column in words[:, 2 * candidates :].unbind(1)]
    kind, forced, token, logprob = columns[:4]
    kept_mass = columns[4].view(torch.float32) if sequence.params.kept_mass else None
    return (
        SoftTokens(
            ids[:, :slots].clone(),
            gprime[:, :slots].clone().view(torch.float32),
            kind.to(torch.uint8),
            forced.bool(),
            token,
        ),
        logprob.view(torch.float32),
        kept_mass,
    )


def _key(sequence: Sequence) -> dict[str, int]:
    """What the noise of a sample depends on beside the token, at its first new position."""
    return {
        # The 64 bits of an unsigned seed in a signed word.
        "seed": sequence.seed - 2**64 if sequence.seed >= 2**63 else sequence.seed,
        "position": len(sequence.prompt),
        "uid": sequence.uid,
        "stream": sequence.stream,
    }


def discrete_values(sequence: Sequence) -> RowValues:
    """How a sample draws discretely."""
    params = sequence.params
    return RowValues(
        temperature=params.temperature or 1.0,
        top_p=params.top_p,
        min_p=params.min_p,
        top_k=params.top_k,
        mode=GREEDY if params.temperature == 0 else DISCRETE,
        **_key(sequence),
    )


def soft_values(sequence: Sequence) -> RowValues:
    """How it draws in its soft phase."""
    soft = sequence.soft
    assert soft is not None
    clamp_low, clamp_high = soft.noise_clip or (-np.inf, np.inf)
    return RowValues(
        temperature=soft.temperature,
        top_p=soft.top_p,
        tau=soft.tau,
        reach=weight_reach(*soft.mixture),
        noise_scale=soft.noise_scale,
        clamp_low=clamp_low,
        clamp_high=clamp_high,
        eps=soft.eps,
        top_k=soft.top_k,
        mode=SOFT,
        noise=method_of(soft.noise).code,
        **_key(sequence),
    )
