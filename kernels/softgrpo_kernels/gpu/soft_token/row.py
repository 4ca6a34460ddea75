"""A row as the kernels read it: `RowParameters` by the names of its columns."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from softgrpo_kernels import row_rules
from softgrpo_kernels.gpu.noise import NoiseKey
from softgrpo_kernels.row_rules import FLOAT_COLUMNS, INT_COLUMNS

GREEDY, DISCRETE = tl.constexpr(row_rules.GREEDY), tl.constexpr(row_rules.DISCRETE)
SOFT, SKIP = tl.constexpr(row_rules.SOFT), tl.constexpr(row_rules.SKIP)

TEMPERATURE = tl.constexpr(FLOAT_COLUMNS.index("temperature"))
TOP_P = tl.constexpr(FLOAT_COLUMNS.index("top_p"))
MIN_P = tl.constexpr(FLOAT_COLUMNS.index("min_p"))
TAU = tl.constexpr(FLOAT_COLUMNS.index("tau"))
REACH = tl.constexpr(FLOAT_COLUMNS.index("reach"))
NOISE_SCALE = tl.constexpr(FLOAT_COLUMNS.index("noise_scale"))
CLAMP_LOW = tl.constexpr(FLOAT_COLUMNS.index("clamp_low"))
CLAMP_HIGH = tl.constexpr(FLOAT_COLUMNS.index("clamp_high"))
EPS = tl.constexpr(FLOAT_COLUMNS.index("eps"))
TOP_K = tl.constexpr(INT_COLUMNS.index("top_k"))
SEED = tl.constexpr(INT_COLUMNS.index("seed"))
POSITION = tl.constexpr(INT_COLUMNS.index("position"))
UID = tl.constexpr(INT_COLUMNS.index("uid"))
STREAM = tl.constexpr(INT_COLUMNS.index("stream"))
MODE = tl.constexpr(INT_COLUMNS.index("mode"))
NOISE = tl.constexpr(INT_COLUMNS.index("noise"))


class Row(NamedTuple):
    """One row of the tables: `index` of `batch`."""

    floats: tl.tensor
    ints: tl.tensor
    batch: tl.tensor
    index: tl.tensor
    k_max: tl.tensor


@triton.jit
def float_of(row, COLUMN: tl.constexpr):
    return tl.load(row.floats + row.batch * COLUMN + row.index)


@triton.jit
def int_of(row, COLUMN: tl.constexpr):
    return tl.load(row.ints + row.batch * COLUMN + row.index)


@triton.jit
def has_listed_size(row):
    """Whether the first top_k candidates fit into the slots."""
    top_k = int_of(row, TOP_K)
    return (top_k >= 1) & (top_k <= row.k_max)


@triton.jit
def is_listed(row):
    """Sampled, and its candidates are recorded."""
    mode = int_of(row, MODE)
    return ((mode == DISCRETE) | (mode == SOFT)) & has_listed_size(row)


@triton.jit
def noise_key(row):
    """What the noise of the row depends on beside the token."""
    return NoiseKey(int_of(row, SEED), int_of(row, POSITION), int_of(row, UID), int_of(row, STREAM))
