"""Paged caches whose unfilled slots show when they are read, and how near attention must be."""

import torch

from softgrpo_engine.ops import reference
from softgrpo_engine.ops.paged_attention import paged_attention


def make_case(lengths, queries, heads=(6, 2), dim=64, page=16, dtype=torch.bfloat16, seed=0):
    """Sequences in shuffled pages. Every slot that no sequence fills is NaN: reading one shows."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    needed = [-(-length // page) for length in lengths]
    num_pages = sum(needed) + 3
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).int()
    cache = torch.full((2, num_pages, num_kv_heads, page, dim), float("nan"), dtype=dtype)
    table = torch.full((len(lengths), max(needed) + 1), -7, dtype=torch.int32)
    start = 0
    for b, length in enumerate(lengths):
        table[b, : needed[b]] = order[start : start + needed[b]]
        start += needed[b]
        for position in range(length):
            values = torch.randn(2, num_kv_heads, dim, generator=generator)
            cache[:, table[b, position // page], :, position % page] = values.to(dtype)
    # Twice the usual spread, so that the softmax is far from uniform.
    q = (2 * torch.randn(sum(queries), num_heads, dim, generator=generator)).to(dtype)
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    lens = torch.tensor(lengths, dtype=torch.int32)
    return (q, cache[0], cache[1], table, lens), {"scale": dim**-0.5, "query_starts": starts}


def assert_accurate(args, kwargs, attend=paged_attention):
    """The error against fp64 is that of fp32 arithmetic and one rounding."""
    q, k_pages, v_pages, *index = args
    wide = [x.double() for x in (q, k_pages, v_pages)]
    exact = reference.paged_attention(*wide, *index, **kwargs)
    out = attend(*args, **kwargs).double()
    plain = reference.paged_attention(*args, **kwargs).double()
    if q.dtype == torch.float32:
        # Scores of hundreds carry an error that no fp32 computation avoids.
        plain_error = (plain - exact).abs()
        assert (out - exact).norm() <= max(1e-6 * exact.norm(), plain_error.norm())
        assert (out - exact).abs().max() <= max(2e-6 * exact.abs().max(), plain_error.max())
    else:
        assert (out - exact).norm() <= 1.1 * (plain - exact).norm()
        assert (out - exact).abs().max() <= 1.5 * (plain - exact).abs().max()
