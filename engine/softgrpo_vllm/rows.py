"""The soft requests that run, by vLLM's slots."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from softgrpo_engine.execution.record import Record
from softgrpo_engine.scheduling.sequence import Sequence
from softgrpo_kernels import SoftToken
from softgrpo_kernels.methods import method_of
from softgrpo_kernels.soft_weights import weights_within
from softgrpo_vllm.history import History
from softgrpo_vllm.request import SoftRequest

NEVER = 2**62


class Positions(NamedTuple):
    """Drawn positions of one request: ids int32 and gprime float32 [T, K], kind uint8 [T]."""

    ids: Tensor
    gprime: Tensor
    kind: Tensor


class SoftRows:
    """How each row draws, and what it drew last, on the device; earlier positions lie on the host,
    in `History`: they are needed only where a request was preempted.

    ids, weights, kind: int32, float32 [rows, K] and uint8 [rows], mixtures of the last positions;
    the draw makes the weights, to the bit those of `soft_weights`.

    What decides which rows are touched is known on the host, so that no step waits for the device:
    of each row is_soft; prompt_len; drawn, positions generated so far; budget, of soft ones;
    min_soft; noise_scale, of noise on mixtures; asks_mass; thinking_end, -1 for none.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.device, self.history = device, History()
        self.is_soft, self.asks_mass = np.zeros(rows, dtype=bool), np.zeros(rows, dtype=bool)
        self.prompt_len, self.drawn, self.budget, self.min_soft, self.thinking_end = np.zeros(
            (5, rows), dtype=np.int64
        )
        self.noise_scale = np.zeros(rows, dtype=np.float32)
        self.ids = torch.empty(rows, 0, dtype=torch.int32, device=device)
        self.weights = torch.empty(rows, 0, device=device)
        self.kind = torch.zeros(rows, dtype=torch.uint8, device=device)
        self.preempted: dict[str, Positions] = {}  # while they are computed again
        self._requests: dict[str, Sequence] = {}
        self._new: dict[str, Sequence] = {}
        self._record: Record | None = None

    @property
    def record(self) -> Record:
        """The parameters of each row. Made when it is first needed: vLLM's sleep would drop what is
        made with the model."""
        if self._record is None:
            self._record = Record(len(self.is_soft), self.device)
        return self._record

    def add(
        self, request_id: str, row: int, request: SoftRequest, prompt: list[int], drawn: int,
        tokenizer: Any,
    ) -> None:  # fmt: skip
        """A request gets a row, new or after so many drawn positions; it draws from `start` on."""
        sequence = request.sequence(request_id, row, prompt, tokenizer)
        self.history.start(request_id, drawn)
        self._requests[request_id] = self._new[request_id] = sequence
        soft, end = sequence.soft, sequence.thinking_end
        self.is_soft[row], self.asks_mass[row] = True, request.kept_mass
        self.prompt_len[row], self.drawn[row] = len(prompt), drawn
        self.budget[row] = (soft and soft.max_soft_tokens) or NEVER
        self.min_soft[row] = soft.min_soft_tokens if soft else 0
        self.thinking_end[row] = -1 if end is None else end
        adds_noise = soft is not None and method_of(soft.noise).adds_noise
        self.noise_scale[row] = soft.noise_scale if soft and adds_noise else 0.0

    def start(self) -> None:
        """The requests that were added draw from now on."""
        new, self._new = self._new, {}
        if not new:
            return
        sequences = list(new.values())
        mass = any(self.asks_mass[sequence.row] for sequence in sequences)
        self._reserve(max(sequence.slots for sequence in sequences), mass)
        self.record.start(sequences)
        for request_id, sequence in new.items():
            if self.drawn[sequence.row]:
                self._resume(request_id, sequence.row)

    def remove(self, request_id: str) -> None:
        """A request loses its row: it has ended, or is preempted."""
        sequence = self._requests.pop(request_id, None)
        if sequence is not None:
            self.is_soft[sequence.row] = False
            self.preempted.pop(request_id, None)
            self.history.leave(request_id)

    def write(
        self, request_ids: Seq[str], rows: np.ndarray, row_B: Tensor, drawn: SoftToken
    ) -> None:
        """Keeps what was drawn next in these rows."""
        self.ids[row_B], self.weights[row_B] = drawn.ids, drawn.weights
        self.kind[row_B] = self.record.soft[row_B] = drawn.kind
        self.history.add(request_ids, drawn)
        self.drawn[rows] += 1
        for request_id in self.preempted.keys() & set(request_ids):
            del self.preempted[request_id]

    def _reserve(self, slots: int, mass: bool) -> None:
        """Makes room for so many candidates of a position, and has kept masses computed."""
        self.record.reserve(1, slots, mass)
        more = self.record.candidates - self.ids.shape[1]
        if more > 0:
            self.ids = F.pad(self.ids, (0, more), value=-1)
            self.weights = F.pad(self.weights, (0, more))

    def _resume(self, request_id: str, row: int | None) -> None:
        """Gives a request its last position again, and all of them for its next prefill."""
        assert row is not None
        positions = Positions(*self.history.read(request_id, self.device))
        self._reserve(positions.ids.shape[1], False)
        more = self.ids.shape[1] - positions.ids.shape[1]
        positions = Positions(
            F.pad(positions.ids, (0, more), value=-1),
            F.pad(positions.gprime, (0, more), value=-torch.inf),
            positions.kind,
        )
        self.preempted[request_id] = positions
        self.ids[row], self.kind[row] = positions.ids[-1], positions.kind[-1]
        self.weights[row] = self.weights_of(row, positions)[-1]
        self.record.soft[row] = positions.kind[-1]

    def weights_of(self, row: int, positions: Positions) -> Tensor:
        """Weights of positions of that row [T, K]."""
        draws, column = self.record.draws, self.record.rows + row
        tau, reach = (x[column].expand(len(positions.kind)) for x in (draws.tau, draws.reach))
        return weights_within(positions.gprime, positions.kind, tau, reach)
