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


class Places(NamedTuple):
    """Where the rows of a batch stand in the tables of a record: row and step int64 [B], and of
    every row of the record whether it draws softly, uint8. All None: the tables are the batch's."""

    row: tl.tensor
    step: tl.tensor
    soft: tl.tensor


class Row(NamedTuple):
    """One row of the tables: column `index` of `columns`, its position `step` further on."""

    floats: tl.tensor
    ints: tl.tensor
    columns: tl.tensor
    index: tl.tensor
    step: tl.tensor
    k_max: tl.tensor


@triton.jit
def row_of(index, floats, ints, columns, k_max, places):
    """Row `index` of the batch. A record has two columns for a row: as it draws discretely, and as
    it draws softly."""
    column, step = index, 0
    if places.row is not None:
        row = tl.load(places.row + index)
        column = tl.load(places.soft + row).to(tl.int64) * (columns // 2) + row
        step = tl.load(places.step + index)
    return Row(floats, ints, columns, column, step, k_max)


@triton.jit
def float_of(row, COLUMN: tl.constexpr):
    return tl.load(row.floats + row.columns * COLUMN + row.index)


@triton.jit
def int_of(row, COLUMN: tl.constexpr):
    return tl.load(row.ints + row.columns * COLUMN + row.index)


@triton.jit
def position_of(row):
    """The counter of the token that is drawn."""
    return int_of(row, POSITION) + row.step


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
def is_unlisted(row):
    """Discrete, and its set may be larger than the slots."""
    return (int_of(row, MODE) == DISCRETE) & ~has_listed_size(row)


@triton.jit
def noise_key(row):
    """What the noise of the row depends on beside the token."""
    return NoiseKey(int_of(row, SEED), position_of(row), int_of(row, UID), int_of(row, STREAM))
