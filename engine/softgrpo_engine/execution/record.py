"""The device's memory of running samples: what was drawn, and how to draw next."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from softgrpo_engine.scheduling.sequence import Sequence
from softgrpo_engine.soft_tokens import SoftTokens
from softgrpo_engine.transfer import ToHost, to_device
from softgrpo_kernels import RowParameters, SoftToken, soft_weights
from softgrpo_kernels.methods import method_of

GREEDY, DISCRETE, SOFT, SKIP = range(4)


class Record:
    """Rows of samples: parameters, and the SoftTokens of every generated position.

    A sample keeps its row while it is preempted; its inputs are rebuilt from here alone. Tables
    grow with the longest answer and the most candidates that were asked for.

    floats [8, 2 rows], ints [7, 2 rows]: RowParameters of every row, first as it draws discretely,
    then softly; the position is that of its first new token. soft: uint8 [rows], 1 where the next
    position is drawn softly.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows, self.device = rows, device
        self.capacity = self.candidates = 0
        self.floats = torch.zeros(8, 2 * rows, device=device)
        self.ints = torch.zeros(7, 2 * rows, dtype=torch.int64, device=device)
        self.soft = torch.zeros(rows, dtype=torch.uint8, device=device)
        self.terminal_ids = torch.empty(rows, 0, dtype=torch.int32, device=device)
        # A number from the host would be copied, and waited for, at each use.
        self._false = torch.zeros((), dtype=torch.bool, device=device)
        self._reader = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._changed: torch.cuda.Event | None = None  # outside of a step
        self._allocate(0, 0)

    def _allocate(self, capacity: int, candidates: int) -> None:
        shape = (self.rows, capacity)
        device = self.device
        self.capacity, self.candidates = capacity, candidates
        self.ids = torch.full((*shape, candidates), -1, dtype=torch.int32, device=device)
        self.gprime = torch.full((*shape, candidates), -torch.inf, device=device)
        self.kind = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.forced = torch.zeros(shape, dtype=torch.bool, device=device)
        self.token = torch.zeros(shape, dtype=torch.int32, device=device)
        self.logprob = torch.zeros(shape, device=device)

    def reserve(self, capacity: int, candidates: int) -> None:
        """Makes room for ``capacity`` positions of ``candidates`` slots, keeping what is there."""
        if capacity <= self.capacity and candidates <= self.candidates:
            return
        old = (self.ids, self.gprime, self.kind, self.forced, self.token, self.logprob)
        length, slots = self.capacity, self.candidates
        self._allocate(max(capacity, length), max(candidates, slots))
        new = (self.ids, self.gprime, self.kind, self.forced, self.token, self.logprob)
        for target, source in zip(new, old, strict=True):
            if source.dim() == 3:
                target[:, :length, :slots] = source
            else:
                target[:, :length] = source
        self._mark_changed()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of it."""
        drawn = (self.ids, self.gprime, self.kind, self.forced, self.token, self.logprob)
        return (*drawn, self.floats, self.ints, self.soft, self.terminal_ids)

    def skip(self, row: int) -> None:
        """Nothing is drawn in this row: it pads batches."""
        for column in (row, self.rows + row):
            self.floats[:, column] = 1.0
            self.ints[5, column] = SKIP

    def start(self, sequences: Seq[Sequence]) -> None:
        """Writes the parameters of samples that just got their rows."""
        if not sequences:
            return
        rows = [sequence.row for sequence in sequences if sequence.row is not None]
        settings = [_discrete(sequence) for sequence in sequences]
        columns = list(rows)
        for sequence, row in zip(sequences, rows, strict=True):
            if sequence.soft is not None:
                columns.append(self.rows + row)
                settings.append(_soft(sequence))
        at = self._to_device(columns)
        floats, ints = zip(*settings, strict=True)
        self.floats[:, at] = self._to_device(floats, np.float32).T
        self.ints[:, at] = self._to_device(ints).T
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

    def parameters(self, rows_B: Tensor, index_B: Tensor) -> RowParameters:
        """How to draw generated position index_B of these rows, each in its phase."""
        column_B = self.soft[rows_B].long() * self.rows + rows_B
        ints = self.ints.index_select(1, column_B)
        ints[2] += index_B
        return RowParameters(self.floats.index_select(1, column_B), ints, self.candidates)

    def write(self, rows_B: Tensor, index_B: Tensor, drawn: SoftToken) -> None:
        """Keeps what was drawn at these positions, and the phase that follows."""
        self.ids[rows_B, index_B] = drawn.ids
        self.gprime[rows_B, index_B] = drawn.gprime
        self.kind[rows_B, index_B] = drawn.kind
        self.forced[rows_B, index_B] = self._false
        self.token[rows_B, index_B] = drawn.token
        self.logprob[rows_B, index_B] = drawn.token_logp
        self.soft[rows_B] = drawn.kind

    def force(self, row: int, index: int, token: int) -> None:
        """Puts ``token`` at a position already drawn; the phase is discrete from here."""
        self.ids[row, index].fill_(-1)
        self.ids[row, index, 0].fill_(token)
        self.gprime[row, index].fill_(-torch.inf)
        self.gprime[row, index, 0].fill_(0.0)
        self.kind[row, index].fill_(0)
        self.forced[row, index].fill_(True)
        self.token[row, index].fill_(token)
        self.logprob[row, index].fill_(0.0)
        self.end_soft_phase(row)
        self._mark_changed()

    def end_soft_phase(self, row: int) -> None:
        """The next position of the row is drawn discretely."""
        self.soft[row].fill_(0)

    def _mark_changed(self) -> None:
        if self._reader is not None:
            self._changed = torch.cuda.Event()
            self._changed.record()

    def inputs(self, rows_T: Tensor, index_T: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates [T, K] int32 and weights [T, K] float32 of generated positions."""
        gprime, kind = self.gprime[rows_T, index_T], self.kind[rows_T, index_T]
        tau = self.floats[3].index_select(0, self.rows + rows_T)
        return self.ids[rows_T, index_T], soft_weights(gprime, kind, tau)

    def soft_tokens(self, sequences: Seq[Sequence]) -> list[tuple[SoftTokens, Tensor]]:
        """The records of samples so far [T, slots] and their log-probabilities [T], copied.

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
            _unpacked(part, self.candidates, sequence.slots)
            for part, sequence in zip(words.split(lengths), sequences, strict=True)
        ]

    def _words(self, places: np.ndarray) -> Tensor:
        """What is recorded at flat places, as one table int32 [T, 2 K + 4]."""
        at = to_device(places, self.device)
        bits = (self.gprime.view(torch.int32), self.logprob.view(torch.int32))
        parts = (self.ids, bits[0], self.kind, self.forced, self.token, bits[1])
        columns = [part.flatten(0, 1).index_select(0, at) for part in parts]
        return torch.cat(
            [c.int().view(len(at), c.shape[1] if c.dim() > 1 else 1) for c in columns], dim=1
        )


def _unpacked(words: Tensor, candidates: int, slots: int) -> tuple[SoftTokens, Tensor]:
    """A sample's rows of `Record._words`; tensors of their own."""
    ids, gprime, rest = words.split([candidates, candidates, 4], dim=1)
    kind, forced, token, logprob = (column.clone() for column in rest.unbind(1))
    return (
        SoftTokens(
            ids[:, :slots].clone(),
            gprime[:, :slots].clone().view(torch.float32),
            kind.to(torch.uint8),
            forced.bool(),
            token,
        ),
        logprob.view(torch.float32),
    )


def _key(sequence: Sequence) -> list[int]:
    # The 64 bits of an unsigned seed in a signed word.
    seed = sequence.seed - 2**64 if sequence.seed >= 2**63 else sequence.seed
    return [seed, len(sequence.prompt), sequence.uid, sequence.stream]


def _discrete(sequence: Sequence) -> tuple[list[float], list[int]]:
    """Columns of `RowParameters` with which a sample draws discretely."""
    params = sequence.params
    floats = [params.temperature or 1.0, params.top_p, params.min_p]
    floats += [1.0, 1.0, -np.inf, np.inf, 0.0]
    mode = GREEDY if params.temperature == 0 else DISCRETE
    return floats, [params.top_k, *_key(sequence), mode, 0]


def _soft(sequence: Sequence) -> tuple[list[float], list[int]]:
    """The same for its soft phase."""
    soft = sequence.soft
    assert soft is not None
    clip = soft.noise_clip or (-np.inf, np.inf)
    floats = [soft.temperature, soft.top_p, 0.0, soft.tau, soft.noise_scale, *clip, soft.eps]
    return floats, [soft.top_k, *_key(sequence), SOFT, method_of(soft.noise).code]
