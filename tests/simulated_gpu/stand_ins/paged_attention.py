"""Stand-ins for the kernels of `softgrpo_engine.ops.gpu.paged_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from .memory import first, rows_of, table_of, write

Grid = tuple[int, ...]


def _places(
    table_BP: Tensor, key_S: Tensor, filled_BS: Tensor, num_kv_heads: int, PAGE: int
) -> Tensor:
    """Where keys lie in the pages, in rows of one head: [B, KV heads, S]. A key that is not filled
    gets the place of the first one, so that its value, times 0, is as finite as the sequence's."""
    first_page = torch.where(filled_BS[:, :1], table_BP[:, int(key_S[0]) // PAGE, None], 0)
    page_BS = torch.where(filled_BS, table_BP[:, key_S // PAGE], first_page)
    offset_BS = torch.where(filled_BS, key_S % PAGE, key_S[0] % PAGE)
    head = torch.arange(num_kv_heads)[:, None]
    return (page_BS[:, None] * num_kv_heads + head) * PAGE + offset_BS[:, None]


def _gathered(pages: Tensor, place_BKS: Tensor, DIM: int) -> Tensor:
    """fp32 [B, KV heads, S, D]."""
    rows = table_of(pages, DIM, DIM).index_select(0, place_BKS.flatten())
    return rows.float().view(*place_BKS.shape, DIM)


def decode_kernel(
    grid: Grid,
    out: Tensor,
    sums: Tensor | None,
    statistics: Tensor | None,
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    table_width: int,
    seq_lens: Tensor,
    scale: float,
    num_kv_heads: int,
    splits: int,
    GROUP: int,
    ROWS: int,
    PAGE: int,
    DIM: int,
    BLOCK_D: int,
    KEYS: int,
    SPLIT: int,
    ONE_SPLIT: bool,
) -> None:
    batch, heads = grid[0], num_kv_heads * GROUP
    assert grid[1:] == (num_kv_heads, splits)
    assert GROUP <= ROWS
    assert DIM <= BLOCK_D
    assert SPLIT % KEYS == 0, "a block of keys that reaches into the next split counts them as 0"
    lengths = first(seq_lens, batch).long()
    longest = int(lengths.max())
    assert longest <= table_width * PAGE, "a sequence that is longer than its pages"
    q_BKGD = first(q, batch * heads * DIM).float().view(batch, num_kv_heads, GROUP, DIM)
    table_BP = rows_of(block_table, batch, table_width, -(-longest // PAGE)).long()
    for split in range(min(splits, -(-longest // SPLIT))):
        key = torch.arange(split * SPLIT, min((split + 1) * SPLIT, longest))
        filled = key < lengths[:, None]
        place = _places(table_BP, key, filled, num_kv_heads, PAGE)
        k_BKSD, v_BKSD = (_gathered(pages, place, DIM) for pages in (k_pages, v_pages))
        scores = (q_BKGD @ k_BKSD.mT) * scale
        scores = scores.masked_fill_(~filled[:, None, None], -torch.inf)
        top = scores.amax(-1, keepdim=True)
        p = torch.exp(scores - top)
        mass, total = p.sum(-1, keepdim=True), p @ v_BKSD
        mine = (lengths > split * SPLIT)[:, None]
        if ONE_SPLIT:
            result = (total / mass).view(batch, -1)
            write(rows_of(out, batch, heads * DIM, heads * DIM), result, mine)
        else:
            assert sums is not None
            assert statistics is not None
            part = mine.repeat_interleave(heads, 0)
            into = rows_of(sums, batch * heads, splits * DIM, DIM, begin=split * DIM)
            write(into, total.view(-1, DIM), part)
            into = rows_of(statistics, batch * heads, splits * 2, 2, begin=split * 2)
            write(into, torch.cat((top, mass), -1).view(-1, 2), part)


def join_kernel(
    grid: Grid,
    out: Tensor,
    sums: Tensor,
    statistics: Tensor,
    seq_lens: Tensor,
    num_heads: int,
    splits: int,
    DIM: int,
    BLOCK_D: int,
    SPLIT: int,
) -> None:
    batch = grid[0]
    assert grid[1] == num_heads
    assert DIM <= BLOCK_D
    used = -(-first(seq_lens, batch).long() // SPLIT)
    assert int(used.max()) <= splits
    live = (torch.arange(splits) < used[:, None])[:, None]
    parts = first(statistics, batch * num_heads * splits * 2).view(batch, num_heads, splits, 2)
    top = torch.where(live, parts[..., 0], -torch.inf)
    factor = torch.where(live, torch.exp(top - top.amax(-1, keepdim=True)), 0.0)
    mass = torch.where(live, parts[..., 1] * factor, 0.0).sum(-1, keepdim=True)
    sums_BQSD = first(sums, batch * num_heads * splits * DIM).view(batch, num_heads, splits, DIM)
    total = torch.where(live[..., None], sums_BQSD * factor[..., None], 0.0).sum(2)
    first(out, batch * num_heads * DIM).copy_((total / mass).flatten())


def prefill_kernel(
    grid: Grid,
    out: Tensor,
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    table_width: int,
    seq_lens: Tensor,
    query_starts: Tensor,
    sequences: int,
    scale: float,
    num_kv_heads: int,
    GROUP: int,
    ROWS: int,
    PAGE: int,
    DIM: int,
    BLOCK_D: int,
    KEYS: int,
) -> None:
    heads, queries = num_kv_heads * GROUP, ROWS // GROUP
    assert grid[1] == num_kv_heads
    assert queries > 0
    assert DIM <= BLOCK_D
    starts = first(query_starts, sequences + 1).tolist()
    lengths = first(seq_lens, sequences).tolist()
    for b, (start, end, length) in enumerate(zip(starts, starts[1:], lengths, strict=False)):
        count = end - start
        if count <= 0:
            continue
        tiles = start // queries + b - (-count // queries)
        assert tiles <= grid[0], f"no program for the last queries of sequence {b}"
        assert count <= length <= table_width * PAGE
        pages = -(-length // PAGE)
        table_BP = rows_of(block_table, 1, table_width, pages, begin=b * table_width).long()
        key = torch.arange(length)
        filled = torch.ones(1, length, dtype=torch.bool)
        place = _places(table_BP, key, filled, num_kv_heads, PAGE)
        k_KSD, v_KSD = (_gathered(cache, place, DIM)[0] for cache in (k_pages, v_pages))
        q_NKGD = rows_of(q, count, heads * DIM, heads * DIM, begin=start * heads * DIM)
        q_KGND = q_NKGD.float().view(count, num_kv_heads, GROUP, DIM).permute(1, 2, 0, 3)
        scores = (q_KGND @ k_KSD.mT[:, None]) * scale
        later = key > key[length - count :, None]
        scores = scores.masked_fill_(later, -torch.inf)
        p = torch.exp(scores - scores.amax(-1, keepdim=True))
        result = (p @ v_KSD[:, None]) / p.sum(-1, keepdim=True)
        into = rows_of(out, count, heads * DIM, heads * DIM, begin=start * heads * DIM)
        into.copy_(result.permute(2, 0, 1, 3).reshape(count, -1))
