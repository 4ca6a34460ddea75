"""The Triton attention kernels against the reference, on short sequences (the interpreter is
slow)."""

import importlib
import itertools

import pytest
import torch
from attention_cases import assert_accurate, make_case

from softgrpo_engine.ops import reference
from softgrpo_engine.ops.gpu.paged_attention import SPLIT, paged_attention

# Not the function that the package has under this name.
module = importlib.import_module("softgrpo_engine.ops.gpu.paged_attention")
DTYPES = [torch.bfloat16, torch.float32]


def case(device, *arguments, **options):
    args, kwargs = make_case(*arguments, **options)
    moved = {k: v.to(device) if torch.is_tensor(v) else v for k, v in kwargs.items()}
    return [x.to(device) for x in args], moved


def decode(args, kwargs):
    return paged_attention(*args, scale=kwargs["scale"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_is_as_accurate_as_fp32_arithmetic(device, dtype):
    # One token; around a page; around a block of keys; around a split; three splits.
    lengths = [1, 15, 16, 17, 63, 65, SPLIT, SPLIT + 1, 2 * SPLIT + 70]
    args, kwargs = case(device, lengths, [1] * len(lengths), dtype=dtype)
    assert_accurate(args, {**kwargs, "query_starts": None}, paged_attention)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_is_as_accurate_as_fp32_arithmetic(device, dtype):
    # Whole prompts, a prompt behind a cached prefix, a sequence with no query, decode rows.
    queries = [67, 23, 0, 1, 1]
    assert_accurate(*case(device, [67, 40, 20, 150, 1], queries, dtype=dtype), paged_attention)


@pytest.mark.parametrize(
    ("heads", "dim", "page"),
    [
        ((4, 4), 64, 16),  # no grouping
        ((9, 3), 64, 16),  # SmolLM2
        ((14, 2), 128, 16),  # Qwen2.5 7B: groups of 7
        ((64, 1), 32, 8),  # a group that fills a tile alone
        ((4, 2), 80, 5),  # a head size and a page that are no power of two
        ((2, 1), 6, 1),  # less than a tensor core takes
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(device, heads, dim, page, dtype):
    lengths = [1, page, page + 1, 70]
    args, kwargs = case(device, lengths, [1] * 4, heads, dim, page, dtype)
    assert_accurate(args, {**kwargs, "query_starts": None}, paged_attention)
    queries = [1, page, 2, 30]
    assert_accurate(*case(device, lengths, queries, heads, dim, page, dtype), paged_attention)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_decoded_row_does_not_depend_on_its_batch(device, dtype, monkeypatch):
    """Alone; with others; beside one that has more splits, so that it is joined of one split."""
    monkeypatch.setattr(module, "SPLIT", 64)
    args, kwargs = case(device, [150, 40, 64, 1], [1] * 4, dtype=dtype)
    together = decode(args, kwargs)
    q, k, v, table, lens = args
    order = torch.tensor([2, 0, 3, 1], device=device)
    moved = decode((q[order], k, v, table[order], lens[order]), kwargs)
    assert torch.equal(moved, together[order])
    for b in range(4):
        row, pages = slice(b, b + 1), -(-int(lens[b]) // 16)
        alone = decode((q[row], k, v, table[row, :pages].contiguous(), lens[row]), kwargs)
        assert torch.equal(alone, together[row])


def test_a_prefilled_row_does_not_depend_on_how_its_sequence_was_cut(device):
    length = 90
    (q, k, v, table, _), kwargs = case(device, [length], [length])
    lens = torch.tensor([length], dtype=torch.int32, device=device)
    whole = paged_attention(q, k, v, table, lens, **kwargs)
    for begin, end in itertools.pairwise([0, 40, 41, length]):
        part = paged_attention(
            q[begin:end],
            k,
            v,
            table,
            torch.tensor([end], dtype=torch.int32, device=device),
            scale=kwargs["scale"],
            query_starts=torch.tensor([0, end - begin], dtype=torch.int32, device=device),
        )
        assert torch.equal(part, whole[begin:end])


@pytest.mark.parametrize("lengths", [[1, 1, 1], [0, 0, 9], [5, 0, 11, 1], [25, 70, 1], [21, 42]])
def test_every_query_has_a_tile(device, lengths):
    """Sequences that end anywhere in a tile of 21 queries, and empty ones."""
    assert_accurate(*case(device, lengths, lengths, heads=(3, 1), dim=16), paged_attention)


def test_large_scores_neither_overflow_nor_vanish(device):
    """Scores of hundreds carry an error that no fp32 computation avoids."""
    (q, *rest), kwargs = case(device, [30, 70], [1, 5], dtype=torch.float32)
    q, wide = q * 30, [x.double() for x in (q * 30, *rest[:2])]
    exact = reference.paged_attention(*wide, *rest[2:], **kwargs)
    plain = reference.paged_attention(q, *rest, **kwargs)
    out = paged_attention(q, *rest, **kwargs)
    assert (out - exact).norm() <= 1.2 * (plain - exact).norm()


def test_nan_query_stays_in_its_row(device):
    (q, *rest), kwargs = case(device, [30, 30], [3, 1])
    clean = paged_attention(q, *rest, **kwargs)
    q[1] = float("nan")
    out = paged_attention(q, *rest, **kwargs)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2, 3]], clean[[0, 2, 3]])


def test_no_rows(device):
    args, kwargs = case(device, [3], [0])
    assert paged_attention(*args, **kwargs).shape == (0, 6, 64)
