"""Triton kernels on the simulated device: in Triton's interpreter, or by their stand-ins."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

from torch import Tensor

if TYPE_CHECKING:
    from simulated_gpu.device import Device

LAUNCH_OPTIONS = {"num_warps", "num_stages", "num_ctas", "enable_fp_fusion", "maxnreg"}


@contextlib.contextmanager
def patched(device: Device) -> Iterator[None]:
    """A launch on CUDA tensors computes in their memory; one on a CPU tensor is refused."""
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:  # not every platform has Triton
        yield
        return
    interpret = GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if not any(x.is_cuda for x in tensors):
            return interpret(self, *args, **kwargs)
        for i, x in enumerate(args):
            if isinstance(x, Tensor) and not x.is_cuda:
                raise ValueError(
                    f"Pointer argument (at {i}) cannot be accessed from Triton (cpu tensor?)"
                )
        grid = _grid(self.grid, kwargs)
        plain = [device.as_cpu(x) for x in args]
        plain_named = {name: device.as_cpu(x) for name, x in kwargs.items()}
        run = _stand_in(self.fn, grid, plain, plain_named)
        if run is None:
            run = lambda: interpret(self, *plain, **plain_named)  # noqa: E731
        return device.launch(self.fn.__name__, tensors, run)

    with mock.patch.object(GridExecutor, "__call__", launch):
        yield


def _grid(grid: Any, arguments: dict[str, Any]) -> tuple[int, ...]:
    grid = grid(arguments) if callable(grid) else grid
    if any(size <= 0 for size in grid) or any(size > 65535 for size in grid[1:]):
        raise RuntimeError(f"Triton Error [CUDA]: invalid argument (grid {grid})")
    return tuple(grid)


def _stand_in(
    kernel: Callable[..., None], grid: tuple[int, ...], args: list[Any], named: dict[str, Any]
) -> Callable[[], None] | None:
    """SOFTGRPO_KERNELS=interpreter: none, the kernels themselves run."""
    from simulated_gpu.stand_ins import STAND_INS

    if os.environ.get("SOFTGRPO_KERNELS") == "interpreter":
        return None
    stand_in = STAND_INS.get(f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}")
    if stand_in is None:
        return None
    options = {name: x for name, x in named.items() if name not in LAUNCH_OPTIONS}
    arguments = inspect.signature(kernel).bind(*args, **options).arguments
    return lambda: stand_in(grid, **arguments)
