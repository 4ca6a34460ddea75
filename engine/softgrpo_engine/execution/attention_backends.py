"""Who computes attention over the KV pages: our kernels, FlashInfer, or PyTorch's varlen_attn."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from softgrpo_engine.model.attention import PagedAttention, attend_by_kernels
from softgrpo_engine.model.config import DecoderConfig
from softgrpo_engine.scheduling.kv_cache import PAGE_SIZE

Attend = Callable[[PagedAttention, Tensor, Tensor, Tensor], Tensor]

_WORKSPACE_BYTES = 128 << 20  # what FlashInfer's documentation asks for
# Keys of one split of FlashInfer: constant, so that a row does not depend on its batch.
_SPLIT_PAGES = 512 // PAGE_SIZE
# Its FlashAttention 2 alone has splits of a constant size. Left to itself it takes FlashAttention
# 3 for prompts on Hopper, which ignores them without a word.
_FLASHINFER_KERNELS = "fa2"


@dataclass(frozen=True)
class HostBatch:
    """A batch as the host knows it, without asking the device; all int32.

    block_table: [B, W]. seq_lens: [B], this pass included. query_starts: [B + 1] rows of each
    sequence, or None when every sequence has one row (decode).
    """

    block_table: np.ndarray
    seq_lens: np.ndarray
    query_starts: np.ndarray | None


class AttentionBackend(Protocol):
    """Chosen once for an engine.

    in_graphs: its decode step can be in a CUDA graph, and the next one be launched before it ends.
    """

    in_graphs: bool

    def plan(self, batch: HostBatch) -> Attend:
        """What computes the attention of this batch, in every layer."""
        ...


class Kernels:
    """Ours: C++ on the CPU, Triton on a GPU."""

    in_graphs = True

    def plan(self, batch: HostBatch) -> Attend:
        return attend_by_kernels


class FlashInfer:
    """FlashInfer's wrappers for paged decode and prefill, on its tensor-core kernels.

    In a decode step a row does not depend on its batch. In a step with parts of prompts it may:
    FlashInfer chooses its tile of queries (16, 64 or 128 rows) by the mean of all sequences' rows.
    They plan on the host, once a step, in buffers that the step before must have left; pages are
    head-major, which it calls "HND".
    """

    in_graphs = False

    def __init__(self, config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> None:
        _check_gpu("flashinfer", dtype, device)
        try:
            library = importlib.import_module("flashinfer")
        except ImportError as error:
            raise ValueError(
                f"attention='flashinfer' cannot be imported ({error}): "
                "pip install 'softgrpo[cuda]', or take attention='kernels'"
            ) from error
        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._decode: Any = library.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_tensor_cores=True, backend=_FLASHINFER_KERNELS
        )
        self._prefill: Any = library.BatchPrefillWithPagedKVCacheWrapper(
            workspace, "HND", backend=_FLASHINFER_KERNELS
        )
        self._heads = (config.num_heads, config.num_kv_heads, config.head_dim, PAGE_SIZE)
        self._options = {
            "sm_scale": config.head_dim**-0.5,
            "q_data_type": dtype,
            "kv_data_type": dtype,
            "fixed_split_size": _SPLIT_PAGES,
        }

    def plan(self, batch: HostBatch) -> Attend:
        counts = -(-batch.seq_lens // PAGE_SIZE)
        used = np.arange(batch.block_table.shape[1]) < counts[:, None]
        pages = (
            _int32(np.concatenate([[0], counts.cumsum()])),
            _int32(batch.block_table[used]),
            _int32(batch.seq_lens - (counts - 1) * PAGE_SIZE),
        )
        if batch.query_starts is None:
            wrapper = self._decode
            wrapper.plan(*pages, *self._heads, **self._options)
        else:
            wrapper = self._prefill
            starts = _int32(batch.query_starts)
            wrapper.plan(starts, *pages, *self._heads, causal=True, **self._options)
        return lambda batch, q, k_pages, v_pages: wrapper.run(q, (k_pages, v_pages))


class Varlen:
    """PyTorch's ``varlen_attn`` over pages, unsplit: a row does not depend on its batch.

    It wants pages of [page_size, heads], which a view of ours is. PyTorch's own FlashAttention 2
    takes only pages of a multiple of 256 tokens, so that FlashAttention 3 must have been activated.
    """

    in_graphs = False

    def __init__(self, config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> None:
        _check_gpu("varlen", dtype, device)
        from torch.nn.attention import current_flash_attention_impl

        if current_flash_attention_impl() != "FA3":
            raise ValueError(
                f"attention='varlen': FlashAttention 2 takes no pages of {PAGE_SIZE} tokens; call "
                "torch.nn.attention.activate_flash_attention_impl('FA3') first, or take "
                "attention='kernels'"
            )

    def plan(self, batch: HostBatch) -> Attend:
        starts = batch.query_starts
        longest = 1 if starts is None else int(np.diff(starts).max())
        return partial(_attend_by_varlen, longest)


def _attend_by_varlen(
    longest_query: int, batch: PagedAttention, q_TQD: Tensor, k_pages: Tensor, v_pages: Tensor
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    sequences, width = batch.block_table.shape
    starts = batch.query_starts
    if starts is None:
        starts = torch.arange(sequences + 1, dtype=torch.int32, device=q_TQD.device)
    out = varlen_attn(
        q_TQD,
        k_pages.transpose(1, 2),
        v_pages.transpose(1, 2),
        starts,
        None,  # where keys start is in the table
        longest_query,
        width * PAGE_SIZE,
        scale=q_TQD.shape[-1] ** -0.5,
        window_size=(-1, 0),
        enable_gqa=True,
        seqused_k=batch.seq_lens,
        block_table=batch.block_table,
        num_splits=1,
    )
    assert isinstance(out, Tensor)  # no auxiliary outputs were asked for
    return out


BACKENDS = ("kernels", "flashinfer", "varlen")


def attention_backend(
    name: str, config: DecoderConfig, dtype: torch.dtype, device: torch.device
) -> AttentionBackend:
    """The back end of this name. Raises ValueError where it cannot run, saying what to do."""
    if name == "kernels":
        return Kernels()
    if name == "flashinfer":
        return FlashInfer(config, dtype, device)
    if name == "varlen":
        return Varlen(config, dtype, device)
    raise ValueError(f"attention={name!r} is not allowed: must be one of {', '.join(BACKENDS)}")


def _check_gpu(name: str, dtype: torch.dtype, device: torch.device) -> None:
    if device.type != "cuda" or dtype != torch.bfloat16:
        raise ValueError(
            f"attention={name!r} needs bfloat16 on a GPU, not {dtype} on {device}: take "
            "attention='kernels'"
        )


def _int32(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32))
