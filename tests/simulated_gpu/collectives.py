"""torch.distributed between processes that each have a simulated GPU: NCCL by gloo."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch.distributed import distributed_c10d

if TYPE_CHECKING:
    from simulated_gpu.device import Device


@contextlib.contextmanager
def patched(device: Device) -> Iterator[None]:
    """``nccl`` is available."""

    class ProcessGroupNCCL(device.core.Collectives):  # type: ignore[name-defined,misc]
        class Options:
            _timeout: Any = None

        def __init__(self, store: Any, rank: int, size: int, options: Options) -> None:
            timeout = options._timeout
            super().__init__(distributed_c10d.ProcessGroupGloo(store, rank, size, timeout))

    values = {"_NCCL_AVAILABLE": True, "ProcessGroupNCCL": ProcessGroupNCCL}
    with mock.patch.multiple(torch.distributed.distributed_c10d, create=True, **values):
        yield
