"""Causal attention over KV pages in Triton; meaning: `ops.reference.paged_attention`.

A program holds a tile of queries and all heads that read one KV head: keys and values are read
once for the whole group. In decoding the keys of a sequence are cut into splits of constant size,
which a second kernel joins in their order: what a row comes to depends on its own sequence alone.
Grids follow from shapes, and a program that has nothing to do ends at once: nothing waits for the
device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softgrpo_kernels.gpu.rounding import INTERPRET, rounded

# Keys of one program in decoding.
SPLIT = 512
# Rows (query, head) of a tile in decoding, at least: a tensor core takes no fewer.
DECODE_ROWS = 16


@triton.jit
def _scores(q, k, scale):
    """fp32 [rows, keys]."""
    if INTERPRET:
        q, k = q.to(tl.float32), k.to(tl.float32)
    return tl.dot(q, tl.trans(k), input_precision="ieee") * scale


@triton.jit
def _add_values(total, p, v):
    """total + p v. A narrow v meets p as the sum of two numbers of its dtype: rounding p once would
    cost as much accuracy as the rounding of the result."""
    high = rounded(p, v.dtype)
    if v.dtype == tl.float32:
        return tl.dot(high, v, total, input_precision="ieee")
    low = rounded(p - high.to(tl.float32), v.dtype)
    if INTERPRET:
        high, low, v = high.to(tl.float32), low.to(tl.float32), v.to(tl.float32)
    return tl.dot(low, v, tl.dot(high, v, total))


@triton.jit
def _attend(
    q, q_position, k_pages, v_pages, table, begin, end, kv_head, num_kv_heads, scale,
    PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """(maxima, masses, sums of values) of the rows over keys begin:end of one sequence."""
    top = tl.full([q.shape[0]], -float("inf"), tl.float32)
    mass = tl.zeros([q.shape[0]], tl.float32)
    total = tl.zeros([q.shape[0], BLOCK_D], tl.float32)
    d = tl.arange(0, BLOCK_D)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        page = tl.load(table + key // PAGE, mask=key < end, other=0).to(tl.int64)
        place = ((page * num_kv_heads + kv_head) * PAGE + key % PAGE)[:, None] * DIM + d[None, :]
        filled = (key < end)[:, None] & (d < DIM)[None, :]
        k = tl.load(k_pages + place, mask=filled, other=0.0)
        s = _scores(q, k, scale)
        s = tl.where(key[None, :] <= q_position[:, None], s, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        factor = tl.exp(top - new_top)
        p = tl.exp(s - new_top[:, None])
        mass = mass * factor + tl.sum(p, axis=1)
        v = tl.load(v_pages + place, mask=filled, other=0.0)
        total = _add_values(total * factor[:, None], p, v)
        top = new_top
    return top, mass, total


@triton.jit(do_not_specialize=["table_width", "num_kv_heads", "splits"])
def decode_kernel(
    out, sums, statistics, q, k_pages, v_pages, block_table, table_width, seq_lens, scale,
    num_kv_heads, splits,
    GROUP: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr, ONE_SPLIT: tl.constexpr,
):  # fmt: skip
    """Program (b, h, s): the heads of KV head h in sequence b over its s-th split of keys.

    Leaves sums of values [B, Hq, splits, D] and (maximum, mass) [B, Hq, splits, 2] for
    `join_kernel`, or with ONE_SPLIT the result.
    """
    sequence, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(seq_lens + sequence)
    begin = split * SPLIT
    if begin < length:
        m, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
        head = (sequence * num_kv_heads + kv_head) * GROUP + m
        real = (m < GROUP)[:, None] & (d < DIM)[None, :]
        q_MD = tl.load(q + head[:, None] * DIM + d[None, :], mask=real, other=0.0)
        top, mass, total = _attend(
            q_MD, tl.full([ROWS], length - 1, tl.int32), k_pages, v_pages,
            block_table + sequence * table_width, begin, tl.minimum(begin + SPLIT, length), kv_head,
            num_kv_heads, scale, PAGE, DIM, BLOCK_D, KEYS,
        )  # fmt: skip
        if ONE_SPLIT:
            result = rounded(tl.div_rn(total, mass[:, None]), out.dtype.element_ty)
            tl.store(out + head[:, None] * DIM + d[None, :], result, mask=real)
        else:
            part = head * splits + split
            tl.store(sums + part[:, None] * DIM + d[None, :], total, mask=real)
            tl.store(statistics + part * 2, top, mask=m < GROUP)
            tl.store(statistics + part * 2 + 1, mass, mask=m < GROUP)


@triton.jit(do_not_specialize=["num_heads", "splits"])
def join_kernel(
    out, sums, statistics, seq_lens, num_heads, splits,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Program (b, h): joins the splits of head h in sequence b, in their order."""
    sequence = tl.program_id(0).to(tl.int64)
    head = sequence * num_heads + tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    top, mass = -float("inf"), 0.0
    total = tl.zeros([BLOCK_D], tl.float32)
    for split in range(tl.cdiv(tl.load(seq_lens + sequence), SPLIT)):
        part = head * splits + split
        part_top = tl.load(statistics + part * 2)
        new_top = tl.maximum(top, part_top)
        factor, part_factor = tl.exp(top - new_top), tl.exp(part_top - new_top)
        part_total = tl.load(sums + part * DIM + d, mask=d < DIM, other=0.0)
        total = total * factor + part_total * part_factor
        mass = mass * factor + tl.load(statistics + part * 2 + 1) * part_factor
        top = new_top
    result = rounded(tl.div_rn(total, mass), out.dtype.element_ty)
    tl.store(out + head * DIM + d, result, mask=d < DIM)


@triton.jit
def _sequence_of(tile, query_starts, sequences, QUERIES: tl.constexpr):
    """The last sequence b with query_starts[b] // QUERIES + b <= tile.

    So many tiles are enough for all before it: cutting b sequences wastes at most b tiles.
    """
    low, high = 0, sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_starts + middle) // QUERIES + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["table_width", "sequences", "num_kv_heads"])
def prefill_kernel(
    out, q, k_pages, v_pages, block_table, table_width, seq_lens, query_starts, sequences, scale,
    num_kv_heads,
    GROUP: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Program (i, h): ROWS // GROUP queries of one sequence, all heads of KV head h."""
    QUERIES: tl.constexpr = ROWS // GROUP
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    sequence = _sequence_of(tile, query_starts, sequences, QUERIES)
    start = tl.load(query_starts + sequence)
    count = tl.load(query_starts + sequence + 1) - start
    first = (tile - start // QUERIES - sequence) * QUERIES
    if first < count:
        m, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
        query = first + m // GROUP
        real = (m < QUERIES * GROUP) & (query < count)
        head = (start + query).to(tl.int64) * num_kv_heads + kv_head
        place = (head * GROUP + m % GROUP)[:, None] * DIM + d[None, :]
        real = real[:, None] & (d < DIM)[None, :]
        q_MD = tl.load(q + place, mask=real, other=0.0)
        length = tl.load(seq_lens + sequence)
        # Rows beyond the last query look where that does, and are not stored.
        position = length - count + tl.minimum(query, count - 1)
        end = length - count + tl.minimum(first + QUERIES, count)
        _, mass, total = _attend(
            q_MD, position, k_pages, v_pages, block_table + sequence.to(tl.int64) * table_width, 0,
            end, kv_head, num_kv_heads, scale, PAGE, DIM, BLOCK_D, KEYS,
        )  # fmt: skip
        result = rounded(tl.div_rn(total, mass[:, None]), out.dtype.element_ty)
        tl.store(out + place, result, mask=real)


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    query_starts: Tensor | None = None,
) -> Tensor:
    """See `softgrpo_engine.ops.paged_attention`; pages and lengths that do not fit go unnoticed."""
    rows, num_heads, dim = q.shape
    _, num_kv_heads, page, _ = k_pages.shape
    sequences, table_width = block_table.shape
    out = torch.empty_like(q)
    if not rows:
        return out
    group, block = num_heads // num_kv_heads, max(16, triton.next_power_of_2(dim))
    # Registers and shared memory: fp32 is computed without tensor cores.
    narrow, warps = q.element_size() == 2, 8 if block >= 128 else 4
    sizes = {"GROUP": group, "PAGE": page, "DIM": dim, "BLOCK_D": block}
    if query_starts is not None:
        tile_rows = max(64 if narrow else 32, triton.next_power_of_2(group))
        tiles = rows // (tile_rows // group) + sequences
        prefill_kernel[(tiles, num_kv_heads)](
            out, q, k_pages, v_pages, block_table, table_width, seq_lens, query_starts, sequences,
            scale, num_kv_heads, ROWS=tile_rows, KEYS=64 if narrow else 32, **sizes,
            num_warps=warps, num_stages=2,
        )  # fmt: skip
        return out
    # Few rounds of large loads: measured on an H200. 128 keys of 256 numbers exceed shared memory.
    keys = (128 if block <= 128 else 64) if narrow else 32
    splits = triton.cdiv(table_width * page, SPLIT)
    sums = statistics = None
    if splits > 1:
        parts = (rows, num_heads, splits)
        sums = torch.empty((*parts, dim), dtype=torch.float32, device=q.device)
        statistics = torch.empty((*parts, 2), dtype=torch.float32, device=q.device)
    decode_kernel[(rows, num_kv_heads, splits)](
        out, sums, statistics, q, k_pages, v_pages, block_table, table_width, seq_lens, scale,
        num_kv_heads, splits, ROWS=max(DECODE_ROWS, triton.next_power_of_2(group)), KEYS=keys,
        **sizes, SPLIT=SPLIT, ONE_SPLIT=splits == 1, num_warps=4 if narrow else warps,
        num_stages=2,
    )  # fmt: skip
    if splits > 1:
        join_kernel[(rows, num_heads)](
            out, sums, statistics, seq_lens, num_heads, splits,
            DIM=dim, BLOCK_D=block, SPLIT=SPLIT, num_warps=1,
        )  # fmt: skip
    return out
