"""The device's memory of running samples: what was drawn, and how to draw next."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_engine.params import NOISES
from softgrpo_engine.sequence import Sequence
from softgrpo_engine.soft_tokens import SoftTokens
from softgrpo_kernels import soft_weights

GREEDY, DISCRETE, SOFT = 0, 1, 2

# Per-sample numbers that an op reads, one row of a table each.
_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "soft_temperature",
    "soft_top_p",
    "tau",
    "noise_scale",
    "noise_low",
    "noise_high",
    "eps",
)
_INTEGERS = ("top_k", "soft_top_k", "seed", "uid", "stream", "discrete_mode", "noise")


class Record:
    """Rows of samples: parameters, and the SoftTokens of every generated position.

    A sample keeps its row while it is preempted; its inputs are rebuilt from here alone. Tables
    grow with the longest answer and the most candidates that were asked for.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows, self.device = rows, device
        self.capacity = self.candidates = 0
        self.floats = torch.zeros(len(_FLOATS), rows, device=device)
        self.integers = torch.zeros(len(_INTEGERS), rows, dtype=torch.int64, device=device)
        self.mode = torch.zeros(rows, dtype=torch.uint8, device=device)
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

    def start(self, sequence: Sequence) -> None:
        """Writes the parameters of a sample that just got its row."""
        assert sequence.row is not None
        params, soft = sequence.params, sequence.soft
        low, high = (soft and soft.noise_clip) or (-torch.inf, torch.inf)
        floats = {
            "temperature": params.temperature or 1.0,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "soft_temperature": soft.temperature if soft else 1.0,
            "soft_top_p": soft.top_p if soft else 1.0,
            "tau": soft.tau if soft else 1.0,
            "noise_scale": soft.noise_scale if soft else 1.0,
            "noise_low": low,
            "noise_high": high,
            "eps": soft.eps if soft else 0.0,
        }
        integers = {
            "top_k": params.top_k,
            "soft_top_k": soft.top_k if soft else 1,
            # The 64 bits of an unsigned seed in a signed word.
            "seed": sequence.seed - 2**64 if sequence.seed >= 2**63 else sequence.seed,
            "uid": sequence.uid,
            "stream": sequence.stream,
            "discrete_mode": GREEDY if params.temperature == 0 else DISCRETE,
            "noise": NOISES.index(soft.noise) if soft else 0,
        }
        row = sequence.row
        self.floats[:, row] = torch.tensor([floats[name] for name in _FLOATS])
        self.integers[:, row] = torch.tensor([integers[name] for name in _INTEGERS])
        self.mode[row] = SOFT if soft else integers["discrete_mode"]
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

    def parameters(self, rows_B: Tensor) -> dict[str, Tensor]:
        """The parameters of a batch, each a contiguous [B]."""
        floats = self.floats.index_select(1, rows_B)
        integers = self.integers.index_select(1, rows_B)
        return {
            **dict(zip(_FLOATS, floats.unbind(0), strict=True)),
            **dict(zip(_INTEGERS, integers.unbind(0), strict=True)),
        }

    def inputs(self, rows_T: Tensor, index_T: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates [T, K] int32 and weights [T, K] float32 of generated positions."""
        gprime, kind = self.gprime[rows_T, index_T], self.kind[rows_T, index_T]
        tau = self.floats[_FLOATS.index("tau")].index_select(0, rows_T)
        return self.ids[rows_T, index_T], soft_weights(gprime, kind, tau)

    def soft_tokens(self, sequence: Sequence) -> tuple[SoftTokens, Tensor]:
        """A sample's record so far [T, slots] and its log-probabilities [T], copied."""
        # A sample that never ran has no row, and nothing in it.
        row, length, slots = sequence.row or 0, sequence.num_generated, sequence.slots
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
