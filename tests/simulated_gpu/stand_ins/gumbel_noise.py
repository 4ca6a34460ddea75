"""Stand-in for the kernel of `softgrpo_kernels.gpu.gumbel_noise`."""

from __future__ import annotations

from torch import Tensor

from softgrpo_kernels import noise as plain
from softgrpo_kernels.cpu import gumbel_noise as cpu
from softgrpo_kernels.extension import cpu_extension

from .memory import first, rows_of

Grid = tuple[int, ...]


def gumbel_noise(
    ids: Tensor, seed: Tensor, position: Tensor, uid: Tensor, stream: Tensor
) -> Tensor:
    """Noise of ids [..., K], keys [...]; the C++ kernel makes the same bits in one call."""
    module = plain if cpu_extension() is None else cpu
    return module.gumbel_noise(ids, seed, position, uid, stream)


def gumbel_noise_kernel(
    grid: Grid,
    out: Tensor,
    ids: Tensor,
    seed: Tensor,
    position: Tensor,
    uid: Tensor,
    stream: Tensor,
    slots: int,
    BLOCK: int,
) -> None:
    rows = grid[0]
    assert (grid[1] - 1) * BLOCK < slots <= grid[1] * BLOCK
    keys = (first(key, rows) for key in (seed, position, uid, stream))
    noise = gumbel_noise(rows_of(ids, rows, slots, slots), *keys)
    rows_of(out, rows, slots, slots).copy_(noise)
