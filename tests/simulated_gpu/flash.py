"""Operators that a CUDA build has and a CPU build lacks: packed flash attention (what
torch.nn.attention.varlen calls), under its real rules, and products with another result type."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from simulated_gpu.device import Device


class Rules:
    """any_dtype: also float32, to compare with the CPU. paged_by_any_size: as FlashAttention 3."""

    any_dtype = False
    paged_by_any_size = False


def register(device: Device) -> torch.library.Library:
    """Kernels of the simulated device; they hold as long as the library is kept."""
    library = torch.library.Library("aten", "IMPL")

    def on_cpu(name: str, compute: Any) -> None:
        def kernel(*args: Any, **options: Any) -> Any:
            tensors = [x for x in (*args, *options.values()) if isinstance(x, Tensor)]
            if any(not x.is_cuda for x in tensors):
                raise RuntimeError(f"{name}: expected all tensors to be on the same device")
            plain = [device.as_cpu(x) for x in args]
            named = {key: device.as_cpu(x) for key, x in options.items()}
            results: list[Tensor] = []

            def run() -> None:
                new = compute(*plain, **named)
                new = new if isinstance(new, tuple) else (new,)
                if results:  # a replay
                    for old, now in zip(results, new, strict=True):
                        old.copy_(now)
                else:
                    results.extend(new)

            device.launch(name, [], run)
            made = tuple(device.core.as_cuda(x) for x in results)
            return made if len(made) > 1 else made[0]

        library.impl(name, kernel, "CUDA")

    on_cpu("_flash_attention_forward", _forward)
    on_cpu("_flash_attention_backward", _backward)
    on_cpu("mm.dtype", lambda a, b, dtype: (a.float() @ b.float()).to(dtype))
    on_cpu("addmm.dtype", _addmm)
    return library


def _addmm(
    c: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    return (beta * c.float() + alpha * (a.float() @ b.float())).to(dtype)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dtype not in (torch.bfloat16, torch.float16) and not Rules.any_dtype:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise RuntimeError("query, key and value must have the same dtype")
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        raise RuntimeError("Input tensor must have contiguous last dimension")
    if q.shape[-1] > 256 or q.shape[-1] % 8:
        raise RuntimeError("FlashAttention takes head dimensions up to 256, multiples of 8")
    if q.shape[1] % k.shape[-2]:
        raise RuntimeError("Number of heads in key/value must divide number of heads in query")


def _check_lengths(
    q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor | None, max_q: int, max_k: int,
    seqused_k: Tensor | None, block_table: Tensor | None,
) -> None:  # fmt: skip
    named = {
        "cum_seq_q": cu_q,
        "cum_seq_k": cu_k,
        "seqused_k": seqused_k,
        "block_table": block_table,
    }
    for name, x in named.items():
        if x is not None and x.dtype != torch.int32:
            raise RuntimeError(f"{name} must have dtype int32")
    if block_table is not None and not Rules.paged_by_any_size and k.shape[1] % 256:
        raise RuntimeError("Paged KV cache block size must be divisible by 256")
    if cu_k is None and block_table is None:
        raise RuntimeError("cum_seq_k is needed without a block_table")
    if int(cu_q[-1]) != q.shape[0] or int(cu_q.diff().max()) > max_q:
        raise RuntimeError("cum_seq_q does not fit the queries")
    if cu_k is not None and int(cu_k.diff().max()) > max_k:
        raise RuntimeError("a sequence has more keys than max_k")


def _spans(
    cu_q: Tensor, cu_k: Tensor | None, page: int, seqused_k: Tensor | None, table: Tensor | None
) -> Iterator[tuple[slice, Any]]:
    """(rows of the queries, index of the keys) of each sequence."""
    starts = cu_q.tolist()
    for b, (begin, end) in enumerate(itertools.pairwise(starts)):
        if table is None:
            assert cu_k is not None
            first, last = int(cu_k[b]), int(cu_k[b + 1])
            yield slice(begin, end), slice(first, last)
        else:
            assert seqused_k is not None
            key = torch.arange(int(seqused_k[b]))
            yield slice(begin, end), (table[b].long()[key // page], key % page)


def _hidden(queries: int, keys: int, left: int, right: int) -> Tensor:
    """Keys that a query does not see; the window ends with the last key."""
    row = torch.arange(queries)[:, None] + keys - queries
    column = torch.arange(keys)
    hidden = torch.zeros(queries, keys, dtype=torch.bool)
    if right >= 0:
        hidden |= column > row + right
    if left >= 0:
        hidden |= column < row - left
    return hidden


def _window(causal: bool, left: int | None, right: int | None) -> tuple[int, int]:
    return -1 if left is None else int(left), 0 if causal else -1 if right is None else int(right)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor | None, max_q: int, max_k: int,
    dropout_p: float, is_causal: bool, return_debug_mask: bool = False, *,
    scale: float | None = None, window_size_left: int | None = None,
    window_size_right: int | None = None, seqused_k: Tensor | None = None,
    block_table: Tensor | None = None, **_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    _check(q, k, v)
    _check_lengths(q, k, cu_q, cu_k, max_q, max_k, seqused_k, block_table)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    window = _window(is_causal, window_size_left, window_size_right)
    heads, repeat = q.shape[1], q.shape[1] // k.shape[-2]
    out, lse = torch.empty_like(q), torch.empty(heads, q.shape[0])
    for rows, at in _spans(cu_q, cu_k, k.shape[1], seqused_k, block_table):
        keys, values = (x[at].float().repeat_interleave(repeat, 1) for x in (k, v))
        s = torch.einsum("qhd,khd->hqk", q[rows].float(), keys) * scale
        s = s.masked_fill(_hidden(s.shape[1], s.shape[2], *window), -torch.inf)
        lse[:, rows] = s.logsumexp(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", s.softmax(-1).nan_to_num(0.0), values).to(q.dtype)
    unused = torch.zeros(2, dtype=torch.uint64), torch.empty(0, dtype=torch.uint64)
    return out, lse, *unused, torch.empty(0, dtype=q.dtype)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor,
    cu_k: Tensor, max_q: int, max_k: int, dropout_p: float, is_causal: bool, rng_state: Tensor,
    unused: Tensor, *, scale: float | None = None, window_size_left: int | None = None,
    window_size_right: int | None = None, **_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    _check(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    window = _window(is_causal, window_size_left, window_size_right)
    kv_heads, repeat = k.shape[1], q.shape[1] // k.shape[1]
    dq, dk, dv = (torch.zeros(x.shape) for x in (q, k, v))
    for rows, at in _spans(cu_q, cu_k, 0, None, None):
        keys, values = (x[at].float().repeat_interleave(repeat, 1) for x in (k, v))
        s = torch.einsum("qhd,khd->hqk", q[rows].float(), keys) * scale
        p = (s - lse[:, rows, None]).exp()
        p = p.masked_fill(_hidden(p.shape[1], p.shape[2], *window), 0.0)
        g, o = grad[rows].float(), out[rows].float()
        dp = torch.einsum("qhd,khd->hqk", g, values)
        ds = p * (dp - (g * o).sum(-1).T[..., None]) * scale
        dq[rows] += torch.einsum("hqk,khd->qhd", ds, keys)
        for total, part in (
            (dk, torch.einsum("hqk,qhd->khd", ds, q[rows].float())),
            (dv, torch.einsum("hqk,qhd->khd", p, g)),
        ):
            total[at] += part.unflatten(1, (kv_heads, -1)).sum(2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
