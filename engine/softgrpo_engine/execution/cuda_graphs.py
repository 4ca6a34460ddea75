"""Decode steps as CUDA graphs: a few shapes of inputs, each recorded once and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from softgrpo_engine.execution.decode_inputs import DecodeInputs, DecodeShape

# The first width of a block table: keys of one split of the attention kernel at 16 a page.
_LEAST_PAGES = 32

Step = Callable[[DecodeInputs], Tensor]


def bucket(shape: DecodeShape, max_batch_size: int) -> DecodeShape:
    """The shape to pad to: 1, 2, 4, 8, 16 and then every 16 rows; widths that double."""
    rows = shape.rows
    padded = 1 << (rows - 1).bit_length() if rows <= 16 else -(-rows // 16) * 16
    return DecodeShape(
        rows=max(rows, min(padded, max_batch_size)),
        pages=max(_LEAST_PAGES, 1 << (shape.pages - 1).bit_length()),
        ends=0 if shape.ends == 0 else 1 << (shape.ends - 1).bit_length(),
        entropies=shape.entropies,
        noises=shape.noises,
        unlisted=shape.unlisted,
    )


class Recorded(Protocol):
    """A recorded step. drawn: what it leaves, overwritten by each replay."""

    drawn: Tensor

    def replay(self) -> None: ...


class CudaGraph:
    """A step in a CUDA graph; the graphs of an engine share one pool of memory, for only one of
    them runs at a time."""

    def __init__(self, step: Callable[[], Tensor], pool: Any) -> None:
        # Compiles the kernels and lets the libraries allocate, which no capture may do.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile: only this one's work is captured.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.drawn = step()

    def replay(self) -> None:
        self._graph.replay()


class DecodeGraphs:
    """Runs decode steps from graphs, recorded when a shape is first seen.

    A graph knows the addresses that it was recorded with: where a tensor of ``addresses`` has moved
    (the record has grown, the cache was made anew, the weights came back from sleep), all are
    recorded again. Weights that are updated in place have not moved.

    step: the decode step, on the device alone. addresses: those of the tensors that it reads and
    writes beside its inputs. record: makes a `Recorded` of a step; a stand-in in tests.
    """

    def __init__(
        self,
        step: Step,
        addresses: Callable[[], tuple[int, ...]],
        device: torch.device,
        record: Callable[[Callable[[], Tensor]], Recorded] | None = None,
    ) -> None:
        self._step, self._addresses, self._device = step, addresses, device
        self._record = record or self._capture
        self._pool: Any = None
        self._graphs: dict[DecodeShape, tuple[Tensor, Recorded]] = {}
        self._recorded_with: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Drops the graphs and the memory that they hold."""
        self._graphs.clear()
        # PyTorch captures no more into a pool whose graphs are gone while a tensor of it is held.
        self._pool = None

    def __call__(self, words: Tensor, padding: Callable[[], Tensor], shape: DecodeShape) -> Tensor:
        """What the step leaves for the inputs in ``words`` (see `DecodeInputs.views`).

        padding: makes inputs of this shape that are padding alone: recording runs the step on them,
        which must not touch a sequence. The result is overwritten by the next call.
        """
        addresses = self._addresses()
        if addresses != self._recorded_with:
            self.clear()
            self._recorded_with = addresses
        if shape not in self._graphs:
            self._graphs[shape] = self._new(padding(), shape)
        buffer, recorded = self._graphs[shape]
        buffer.copy_(words, non_blocking=True)
        recorded.replay()
        return recorded.drawn

    def _new(self, padding: Tensor, shape: DecodeShape) -> tuple[Tensor, Recorded]:
        buffer = padding.to(self._device, copy=True, non_blocking=True)
        inputs = DecodeInputs.views(buffer, shape)
        return buffer, self._record(lambda: self._step(inputs))

    def _capture(self, step: Callable[[], Tensor]) -> Recorded:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return CudaGraph(step, self._pool)
