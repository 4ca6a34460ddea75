import itertools

import pytest
import torch
from attention_cases import assert_accurate, make_case

from softgrpo_engine.ops.extension import cpu_extension
from softgrpo_engine.ops.paged_attention import paged_attention

compiled = pytest.mark.skipif(
    cpu_extension() is None, reason="the reference checks nothing and promises no bits"
)

PORTABLE, AVX2, BEST = 0, 1, 2


def limit_isa(level):
    if cpu_extension() is not None:
        cpu_extension().limit_isa(level)


@pytest.fixture(autouse=True)
def _best_isa():
    yield
    limit_isa(BEST)


# One token; around a page; around a chunk of 64; around a split of 512 and beyond.
LENGTHS = [1, 15, 16, 17, 63, 64, 65, 100, 511, 512, 513, 1100]


@pytest.mark.parametrize("isa", [PORTABLE, AVX2, BEST])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decode_is_as_accurate_as_fp32_arithmetic(dtype, isa):
    limit_isa(isa)
    args, kwargs = make_case(LENGTHS, [1] * len(LENGTHS), dtype=dtype)
    assert_accurate(args, kwargs)
    assert_accurate(args, {**kwargs, "query_starts": None})


@pytest.mark.parametrize("isa", [PORTABLE, AVX2, BEST])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_prefill_is_as_accurate_as_fp32_arithmetic(dtype, isa):
    limit_isa(isa)
    # Whole prompts, a prompt behind a cached prefix, a sequence with no query, decode rows.
    assert_accurate(*make_case([67, 40, 20, 600, 1], [67, 23, 0, 1, 1], dtype=dtype))


@pytest.mark.parametrize(
    ("heads", "dim", "page"),
    [
        ((4, 4), 64, 16),  # no grouping
        ((9, 3), 64, 32),  # SmolLM2
        ((14, 2), 128, 16),  # groups of 7 = 4 + 3 rows
        ((64, 1), 32, 8),  # more heads in a group than a block has rows
        ((4, 2), 80, 5),  # a partial vector of dimensions, pages across vectors of keys
        ((2, 1), 6, 1),  # less than one vector
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shapes(heads, dim, page, dtype):
    assert_accurate(*make_case([1, page, page + 1, 90], [1, page, 2, 50], heads, dim, page, dtype))


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_has_the_same_bits_however_its_sequence_was_cut(dtype):
    length = 600
    (q, k, v, table, _), kwargs = make_case([length], [length], dtype=dtype)
    whole = paged_attention(q, k, v, table, torch.tensor([length], dtype=torch.int32), **kwargs)
    for cuts in ([0, 100, 163, length], range(560, length + 1)):
        for begin, end in itertools.pairwise(cuts):
            part = paged_attention(
                q[begin:end],
                k,
                v,
                table,
                torch.tensor([end], dtype=torch.int32),
                scale=kwargs["scale"],
                query_starts=torch.tensor([0, end - begin], dtype=torch.int32),
            )
            assert torch.equal(part, whole[begin:end])


@compiled
def test_a_row_has_the_same_bits_whatever_the_batch_and_the_threads():
    args, kwargs = make_case([1300, 40, 700, 1], [1, 1, 1, 1])
    q, k, v, table, lens = args
    together = paged_attention(*args, **kwargs)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(paged_attention(*args, **kwargs), together)
            for b in range(4):
                row = slice(b, b + 1)
                alone = paged_attention(q[row], k, v, table[row], lens[row], scale=kwargs["scale"])
                assert torch.equal(alone, together[row])
    finally:
        torch.set_num_threads(threads)


@compiled
def test_a_row_has_the_same_bits_whatever_the_page_size():
    outs = []
    for page in (16, 7):
        args, kwargs = make_case([130, 70], [40, 1], page=page)
        outs.append(paged_attention(*args, **kwargs))
    assert torch.equal(*outs)


def test_large_scores_neither_overflow_nor_vanish():
    args, kwargs = make_case([300, 700], [1, 5], dtype=torch.float32)
    q, *rest = args
    assert_accurate((q * 30, *rest), kwargs)


def test_nan_query_stays_in_its_row():
    (q, *rest), kwargs = make_case([30, 30], [3, 1])
    clean = paged_attention(q, *rest, **kwargs)
    q[1] = float("nan")
    out = paged_attention(q, *rest, **kwargs)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2, 3]], clean[[0, 2, 3]])


@compiled
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, k: a[4].fill_(2), "3 queries, but seq_lens is 2"),
        (lambda a, k: a[4].fill_(99), "more than its block_table row can hold"),
        (lambda a, k: a[3].fill_(50), "page 50 of"),
        (lambda a, k: a[3].fill_(-1), "page -1 of"),
        (lambda a, k: k["query_starts"][2:].fill_(5), "must rise from 0 to the 4 rows of q"),
        (lambda a, k: k["query_starts"][1:2].fill_(-1), "must rise from 0"),
    ],
)
def test_bad_indices_are_one_clear_error(change, message):
    args, kwargs = make_case([30, 30], [3, 1])
    change(args, kwargs)
    with pytest.raises(ValueError, match=message):
        paged_attention(*args, **kwargs)


@compiled
def test_bad_shapes_and_dtypes_are_one_clear_error():
    (q, k, v, table, lens), kwargs = make_case([30], [3])
    with pytest.raises(ValueError, match=r"must be torch\.bfloat16"):
        paged_attention(q, k.float(), v, table, lens, **kwargs)
    with pytest.raises(ValueError, match="multiple of Hkv"):
        paged_attention(q[:, :5], k, v, table, lens, **kwargs)
    with pytest.raises(ValueError, match="must be int32"):
        paged_attention(q, k, v, table.long(), lens, **kwargs)
    with pytest.raises(ValueError, match=r"need seq_lens \[1\]"):
        paged_attention(q, k, v, table, lens.repeat(2), **kwargs)
    with pytest.raises(ValueError, match="q must have 3 dimensions"):
        paged_attention(q[0], k, v, table, lens, **kwargs)
    with pytest.raises(ValueError, match="seq_lens is on meta"):
        paged_attention(q, k, v, table, lens.to("meta"), **kwargs)
    with pytest.raises(ValueError, match="inference_mode"):
        paged_attention(q.requires_grad_(), k, v, table, lens, **kwargs)
