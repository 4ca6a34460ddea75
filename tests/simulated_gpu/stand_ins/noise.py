"""Stand-in for the kernel of `softgrpo_kernels.gpu.noise`."""

from __future__ import annotations

from torch import Tensor

from softgrpo_kernels.reference.noise import gumbel_noise

from .memory import first, rows_of

Grid = tuple[int, ...]


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
