"""The device's memory of running samples: what was drawn, and how to draw next."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_engine.params import NOISES
from softgrpo_engine.sequence import Sequence
from softgrpo_engine.soft_tokens import SoftTokens
from softgrpo_kernels import RowParameters, SoftToken, soft_weights

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

    def start(self, sequence: Sequence) -> None:
        """Writes the parameters of a sample that just got its row."""
        assert sequence.row is not None
        row, params, soft = sequence.row, sequence.params, sequence.soft
        # The 64 bits of an unsigned seed in a signed word.
        seed = sequence.seed - 2**64 if sequence.seed >= 2**63 else sequence.seed
        key = [seed, len(sequence.prompt), sequence.uid, sequence.stream]
        unbounded = (-torch.inf, torch.inf)
        floats = [params.temperature or 1.0, params.top_p, params.min_p, 1.0, 1.0, *unbounded, 0.0]
        self.floats[:, row] = torch.tensor(floats)
        mode = GREEDY if params.temperature == 0 else DISCRETE
        self.ints[:, row] = torch.tensor([params.top_k, *key, mode, 0])
        if soft is not None:
            clip = soft.noise_clip or unbounded
            floats = [
                soft.temperature,
                soft.top_p,
                0.0,
                soft.tau,
                soft.noise_scale,
                *clip,
                soft.eps,
            ]
            self.floats[:, self.rows + row] = torch.tensor(floats)
            noise = NOISES.index(soft.noise)
            self.ints[:, self.rows + row] = torch.tensor([soft.top_k, *key, SOFT, noise])
        self.soft[row] = int(soft is not None)
        terminal = sorted(sequence.end_ids)
        if sequence.thinking_end is not None:
            terminal.append(sequence.thinking_end)
        self._set_terminal_ids(row, terminal)

    def _set_terminal_ids(self, row: int, ids: list[int]) -> None:
        width = self.terminal_ids.shape[1]
        if len(ids) > width:
            pad = torch.full((self.rows, len(ids) - width), -1, dtype=torch.int32)
            self.terminal_ids = torch.cat([self.terminal_ids, pad.to(self.device)], dim=1)
        self.terminal_ids[row] = -1
        self.terminal_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)

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
        self.forced[rows_B, index_B] = False
        self.token[rows_B, index_B] = drawn.token
        self.logprob[rows_B, index_B] = drawn.token_logp
        self.soft[rows_B] = drawn.kind

    def force(self, row: int, index: int, token: int) -> None:
        """Puts ``token`` at a position already drawn; the phase is discrete from here."""
        self.ids[row, index] = -1
        self.ids[row, index, 0] = token
        self.gprime[row, index] = -torch.inf
        self.gprime[row, index, 0] = 0.0
        self.kind[row, index] = 0
        self.forced[row, index] = True
        self.token[row, index] = token
        self.logprob[row, index] = 0.0
        self.soft[row] = 0

    def inputs(self, rows_T: Tensor, index_T: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates [T, K] int32 and weights [T, K] float32 of generated positions."""
        gprime, kind = self.gprime[rows_T, index_T], self.kind[rows_T, index_T]
        tau = self.floats[3].index_select(0, self.rows + rows_T)
        return self.ids[rows_T, index_T], soft_weights(gprime, kind, tau)

    def soft_tokens(self, sequence: Sequence) -> tuple[SoftTokens, Tensor]:
        """A sample's record so far [T, slots] and its log-probabilities [T], copied."""
        # A sample that never ran has no row, and nothing in it.
        row, length, slots = sequence.row or 0, len(sequence.tokens), sequence.slots
        ids, gprime, *rest = (
            part[row, :length].cpu().clone()
            for part in (
                self.ids[..., :slots],
                self.gprime[..., :slots],
                self.kind,
                self.forced,
                self.token,
                self.logprob,
            )
        )
        return SoftTokens(ids, gprime, *rest[:3]), rest[3]
