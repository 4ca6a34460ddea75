"""FlashInfer and varlen_attn behind the engine: stand-ins hold them to their documented contracts
and compute what they would, so that a wrong table, length or layout gives other tokens."""

import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import varlen

from softgrpo_engine import SamplingParams, SoftParams
from softgrpo_engine.execution import attention_backends
from softgrpo_engine.ops import reference

PAGE = 16
PARAMS = SamplingParams(n=2, max_tokens=20, seed=4, ignore_eos=True)
SOFT = SoftParams(top_k=4, tau=0.7, end_of_thinking=None, max_soft_tokens=9)


@pytest.fixture
def on_cpu(monkeypatch):
    """The stand-ins need no GPU."""
    monkeypatch.setattr(attention_backends, "_check_gpu", lambda *_: None)


def check_int32(tensor, shape):
    assert tensor.dtype == torch.int32
    assert tuple(tensor.shape) == shape
    assert tensor.is_contiguous()


class Wrapper:
    """FlashInfer 0.6's wrappers: ``plan`` with tables of the host, ``run`` in each layer.

    docs.flashinfer.ai: pages of sequence b are indices[indptr[b]:indptr[b + 1]], of the last one
    last_page_len[b] slots are filled; HND pages are [pages, heads, page_size, head_dim].
    """

    plans = 0

    def __init__(self, workspace, kv_layout, use_tensor_cores=False, *, backend):
        assert workspace.dtype == torch.uint8
        assert kv_layout == "HND"
        assert backend == "fa2"  # fixed_split_size is of these kernels alone
        self.tensor_cores = use_tensor_cores
        self.is_planned = False

    def remember(
        self, starts, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim,
        page_size, *, sm_scale, q_data_type, kv_data_type, fixed_split_size,
    ):  # fmt: skip
        batch = len(last_page_len)
        check_int32(starts, (batch + 1,))
        check_int32(indptr, (batch + 1,))
        check_int32(last_page_len, (batch,))
        check_int32(indices, (int(indptr[-1]),))
        assert last_page_len.min() >= 1
        assert last_page_len.max() <= page_size
        assert (num_qo_heads, num_kv_heads, head_dim, page_size) == (6, 2, 8, PAGE)
        assert q_data_type == kv_data_type == torch.float32
        assert fixed_split_size > 0
        self.tables = starts, indptr, indices, last_page_len, sm_scale
        self.is_planned = True
        Wrapper.plans += 1

    def run(self, q, paged_kv_cache):
        assert self.is_planned
        k_pages, v_pages = paged_kv_cache
        starts, indptr, indices, last_page_len, scale = self.tables
        counts = indptr.diff()
        table = torch.zeros(len(counts), int(counts.max()), dtype=torch.int32)
        for b, row in enumerate(table):
            row[: counts[b]] = indices[indptr[b] : indptr[b + 1]]
        lens = (counts - 1) * k_pages.shape[2] + last_page_len
        return reference.paged_attention(
            q, k_pages, v_pages, table, lens, scale=scale, query_starts=starts
        )


class DecodeWrapper(Wrapper):
    def plan(self, indptr, *tables, **options):
        assert self.tensor_cores  # the others refuse fixed_split_size
        starts = torch.arange(len(indptr), dtype=torch.int32)
        self.remember(starts, indptr, *tables, **options)


class PrefillWrapper(Wrapper):
    def plan(self, qo_indptr, *tables, causal, **options):
        assert causal
        self.remember(qo_indptr, *tables, **options)


def varlen_stand_in(*args, **kwargs):
    """`varlen_attn` of pages; torch/nn/attention/varlen.py says what its arguments mean."""
    bound = REAL_SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    given = SimpleNamespace(**bound.arguments)
    batch = len(given.cu_seq_q) - 1
    check_int32(given.cu_seq_q, (batch + 1,))
    check_int32(given.seqused_k, (batch,))
    check_int32(given.block_table, (batch, given.block_table.shape[1]))
    assert given.cu_seq_k is None  # FlashAttention 3 refuses it beside a table
    assert given.query.stride(-1) == given.key.stride(-1) == given.value.stride(-1) == 1
    assert given.key.shape[1:] == given.value.shape[1:] == (PAGE, 2, 8)
    assert given.max_q == given.cu_seq_q.diff().max()
    assert given.max_k >= given.seqused_k.max()
    assert (given.window_size, given.enable_gqa, given.num_splits) == ((-1, 0), True, 1)
    return reference.paged_attention(
        given.query,
        given.key.transpose(1, 2),
        given.value.transpose(1, 2),
        given.block_table,
        given.seqused_k,
        scale=given.scale,
        query_starts=given.cu_seq_q,
    )


REAL_SIGNATURE = inspect.signature(varlen.varlen_attn)


@pytest.fixture
def flashinfer(monkeypatch, on_cpu):
    Wrapper.plans = 0
    library = SimpleNamespace(
        BatchDecodeWithPagedKVCacheWrapper=DecodeWrapper,
        BatchPrefillWithPagedKVCacheWrapper=PrefillWrapper,
    )
    monkeypatch.setitem(sys.modules, "flashinfer", library)


@pytest.fixture
def flash_attention_3(monkeypatch, on_cpu):
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA3")
    monkeypatch.setattr(varlen, "varlen_attn", varlen_stand_in)


def rollouts(make_llm, prompts, **options):
    # Chunks of prompts beside decoding, and preemption.
    llm = make_llm(max_batch_tokens=24, pages=9, **options)
    outputs = llm.generate(prompts, PARAMS, SOFT, progress=False)
    assert llm.metrics()["preemptions"] > 0
    return [sample for output in outputs for sample in output.samples]


def assert_equal(samples, expected):
    for a, b in zip(samples, expected, strict=True):
        assert a.token_ids == b.token_ids
        torch.testing.assert_close(a.soft.gprime, b.soft.gprime, rtol=1e-4, atol=1e-4)


def test_flashinfer_gives_the_tokens_of_our_kernels(make_llm, prompts, flashinfer):
    assert_equal(rollouts(make_llm, prompts, attention="flashinfer"), rollouts(make_llm, prompts))
    assert Wrapper.plans > 0


def test_varlen_gives_the_tokens_of_our_kernels(make_llm, prompts, flash_attention_3):
    assert_equal(rollouts(make_llm, prompts, attention="varlen"), rollouts(make_llm, prompts))


@pytest.mark.parametrize("name", ["flashinfer", "varlen"])
def test_without_a_gpu_it_is_refused(make_llm, name):
    with pytest.raises(ValueError, match=f"attention='{name}' needs bfloat16 on a GPU"):
        make_llm(attention=name)


def test_an_absent_flashinfer_names_the_extra(make_llm, monkeypatch, on_cpu):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(ValueError, match=r"pip install 'softgrpo\[cuda\]'"):
        make_llm(attention="flashinfer")


def test_varlen_needs_kernels_that_take_our_pages(make_llm, on_cpu):
    with pytest.raises(ValueError, match="takes no pages of 16 tokens; call torch"):
        make_llm(attention="varlen")


def test_an_unknown_name_lists_the_others(make_llm):
    with pytest.raises(ValueError, match="must be one of kernels, flashinfer, varlen"):
        make_llm(attention="sdpa")
