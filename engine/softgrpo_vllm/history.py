"""What was drawn, on the host: for requests that vLLM preempts, and computes again later."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from softgrpo_engine.transfer import ToHost, to_device
from softgrpo_kernels import SoftToken

SHELF_BYTES = 2**30
"""For requests that have left their row. vLLM does not say whether they ended or come back."""


class History:
    """The candidates of all positions of running requests, and of those that left last.

    Steps are copied as they are drawn, and nothing waits for them: they are read only where a
    request comes back.
    """

    def __init__(self, shelf_bytes: int = SHELF_BYTES) -> None:
        self._running: dict[str, list[tuple[ToHost, int]]] = {}
        self._shelf: OrderedDict[str, list[tuple[ToHost, int]]] = OrderedDict()
        self._shelf_bytes, self._shelved = shelf_bytes, 0

    def start(self, request_id: str, positions: int) -> None:
        """A request runs of which so many positions have been drawn.

        Raises RuntimeError for one that left so long ago that they are gone.
        """
        steps = self._unshelve(request_id)
        if len(steps) < positions:
            raise RuntimeError(
                f"softgrpo: request {request_id} comes back after its soft tokens were dropped "
                f"({self._shelf_bytes} bytes of later requests): lower --max-num-seqs"
            )
        # One more may have been drawn than vLLM had read: it is drawn again.
        self._running[request_id] = steps[:positions]

    def leave(self, request_id: str) -> None:
        """A request has ended, or is preempted."""
        steps = self._running.pop(request_id)
        self._unshelve(request_id)
        self._shelf[request_id] = steps
        self._shelved += _bytes(steps)
        while self._shelved > self._shelf_bytes:
            self._unshelve(next(iter(self._shelf)))

    def add(self, request_ids: Seq[str], drawn: SoftToken) -> None:
        """The next position of each of these requests."""
        kind_B1 = drawn.kind.int()[:, None]
        words = torch.cat([drawn.ids, drawn.gprime.view(torch.int32), kind_B1], dim=1)
        step = ToHost(words)
        for i, request_id in enumerate(request_ids):
            self._running[request_id].append((step, i))

    def read(self, request_id: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """ids, g' [T, K] and kind [T] of all positions of a running request; waits for them."""
        rows = [step.wait()[i] for step, i in self._running[request_id]]
        most = max(map(len, rows)) // 2
        words = torch.full((len(rows), 2 * most + 1), -1, dtype=torch.int32)
        gprime = words[:, most : 2 * most].view(torch.float32)
        gprime.fill_(-torch.inf)
        for row, read in zip(words, rows, strict=True):
            slots = len(read) // 2
            row[:slots], row[most : most + slots] = read[:slots], read[slots : 2 * slots]
            row[-1] = read[-1]
        words = to_device(words, device)
        ids, values, kind = words.split([most, most, 1], dim=1)
        return ids, values.view(torch.float32), kind[:, 0].to(torch.uint8)

    def _unshelve(self, request_id: str) -> list[tuple[ToHost, int]]:
        steps = self._shelf.pop(request_id, [])
        self._shelved -= _bytes(steps)
        return steps


def _bytes(steps: Seq[tuple[ToHost, int]]) -> int:
    # A position holds at most a row of the widest step, and its place in two lists.
    return len(steps) * 4 * (2 * 64 + 1)
