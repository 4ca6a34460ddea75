"""Dot products with selected rows of a table, and the sums of their gradient, in Triton.

Meaning: `softgrpo_kernels.reference.indexed_dot`. fp32 accumulation in an order that depends on the
shapes alone; no atomics, and nothing waits for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softgrpo_kernels.gpu.rounding import rounded
from softgrpo_kernels.gpu.soft_embedding import soft_embedding
from softgrpo_kernels.tensors import int32, unit_stride

BLOCK_H = 256
BLOCK_K = 8
# Pairs (row, slot) that one program adds up. A token that is in every row is many pieces.
PIECE = 128

_UNUSED = torch.iinfo(torch.int32).max


@triton.jit(do_not_specialize=["slots"])
def indexed_dot_kernel(
    out, hidden, table, ids, hidden_stride, table_stride, slots, width,
    BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Program (i, g): the dot products of row i with its g-th block of candidates."""
    row = tl.program_id(0).to(tl.int64)
    slot_K = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    id_K = tl.load(ids + row * slots + slot_K, mask=slot_K < slots, other=-1)
    start_K = id_K.to(tl.int64) * table_stride
    sum_KH = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
    for begin in range(0, width, BLOCK_H):
        h = begin + tl.arange(0, BLOCK_H)
        x_H = tl.load(hidden + row * hidden_stride + h, mask=h < width, other=0.0)
        w_KH = tl.load(
            table + start_K[:, None] + h[None, :],
            mask=(id_K >= 0)[:, None] & (h < width)[None, :],
            other=0.0,
        )
        sum_KH += w_KH.to(tl.float32) * x_H.to(tl.float32)[None, :]
    tl.store(out + row * slots + slot_K, tl.sum(sum_KH, axis=1), mask=slot_K < slots)


@triton.jit(do_not_specialize=["count", "slots"])
def piece_sums_kernel(
    table_grad, heads, tails, tokens, pairs, grad, hidden, table_stride, hidden_stride, count,
    slots, width, UNUSED: tl.constexpr, PIECE: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Program (i, b): sums of the i-th piece of the pairs, sorted by token, block b of the width.

    A token whose pairs all lie in this piece is done. One that began in an earlier piece leaves
    its sum in `heads`, one that began here and goes on in `tails`.
    """
    piece = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = h < width
    begin = piece * PIECE
    end = tl.minimum(begin + PIECE, count)
    before = tl.load(tokens + begin - 1, mask=begin > 0, other=-1)
    began_earlier = before == tl.load(tokens + begin)
    sum_H = tl.zeros([BLOCK_H], tl.float32)
    for i in range(begin, end):
        token = tl.load(tokens + i)
        pair = tl.load(pairs + i)
        used = token != UNUSED
        x_H = tl.load(
            hidden + (pair // slots) * hidden_stride + h,
            mask=h < tl.where(used, width, 0),
            other=0.0,
        ).to(tl.float32)
        sum_H += tl.load(grad + pair) * x_H
        ends = tl.load(tokens + i + 1, mask=i + 1 < count, other=-1) != token
        if used & (ends | (i + 1 == end)):
            if began_earlier:
                tl.store(heads + piece * width + h, sum_H, mask=inside)
            elif ends:
                place = table_grad + token.to(tl.int64) * table_stride + h
                old_H = tl.load(place, mask=inside, other=0.0).to(tl.float32)
                tl.store(place, rounded(old_H + sum_H, table_grad.dtype.element_ty), mask=inside)
            else:
                tl.store(tails + piece * width + h, sum_H, mask=inside)
        began_earlier = began_earlier & (ends == 0)
        sum_H = tl.where(ends, 0.0, sum_H)


@triton.jit(do_not_specialize=["count"])
def join_pieces_kernel(
    table_grad, heads, tails, tokens, ends, table_stride, count, width,
    UNUSED: tl.constexpr, PIECE: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Program (i, b): the token that begins in piece i and goes on: its pieces, in their order.

    ends: for every piece, where the pairs of its last token end.
    """
    piece = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    begin = piece * PIECE
    last = begin + PIECE - 1
    token = tl.load(tokens + last, mask=last < count, other=UNUSED)
    before = tl.load(tokens + begin - 1, mask=begin > 0, other=-1)
    end = tl.load(ends + piece)
    if (end > last + 1) & (before != token) & (token != UNUSED):
        inside = h < width
        sum_H = tl.load(tails + piece * width + h, mask=inside, other=0.0)
        for later in range(piece + 1, (end - 1) // PIECE + 1):
            sum_H += tl.load(heads + later * width + h, mask=inside, other=0.0)
        place = table_grad + token.to(tl.int64) * table_stride + h
        old_H = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        tl.store(place, rounded(old_H + sum_H, table_grad.dtype.element_ty), mask=inside)


def indexed_dot(hidden: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """z_ij = <hidden_i, table[ids_ij]>: [N, K] fp32, 0 where ids < 0."""
    hidden, table = unit_stride(hidden), unit_stride(table)
    ids = int32(ids)
    out = torch.empty(ids.shape, dtype=torch.float32, device=ids.device)
    if out.numel():
        rows, slots = ids.shape
        indexed_dot_kernel[(rows, triton.cdiv(slots, BLOCK_K))](
            out, hidden, table, ids, hidden.stride(0), table.stride(0), slots, hidden.shape[1],
            BLOCK_K=BLOCK_K, BLOCK_H=BLOCK_H,
        )  # fmt: skip
    return out


def indexed_dot_backward_hidden(
    grad: Tensor, table: Tensor, ids: Tensor, dtype: torch.dtype
) -> Tensor:
    """dX_i = sum_j grad_ij table[ids_ij]: the mixture of rows with grad for weights."""
    return soft_embedding(ids, grad, table, dtype=dtype)


def indexed_dot_add_to_table(table_grad: Tensor, grad: Tensor, hidden: Tensor, ids: Tensor) -> None:
    """table_grad[ids_ij] += grad_ij hidden_i in place, one rounding of (old + the row's sum).

    Args:
        table_grad: [V, H], unit stride in H. grad: [N, K]; hidden: [N, H]; ids: int [N, K].
    """
    if not ids.numel():
        return
    hidden, grad = unit_stride(hidden), grad.float().contiguous()
    flat = ids.to(torch.int32).flatten()
    tokens, pairs = torch.where(flat < 0, _UNUSED, flat).sort(stable=True)
    width, count = hidden.shape[1], flat.numel()
    grid = (triton.cdiv(count, PIECE), triton.cdiv(width, BLOCK_H))
    heads, tails = torch.empty((2, grid[0], width), dtype=torch.float32, device=ids.device)
    blocks = {"UNUSED": _UNUSED, "PIECE": PIECE, "BLOCK_H": BLOCK_H}
    piece_sums_kernel[grid](
        table_grad, heads, tails, tokens, pairs, grad, hidden, table_grad.stride(0),
        hidden.stride(0), count, ids.shape[1], width, **blocks,
    )  # fmt: skip
    ends = torch.searchsorted(tokens, tokens[PIECE - 1 :: PIECE].contiguous(), right=True)
    ends = torch.nn.functional.pad(ends, (0, grid[0] - len(ends)), value=0)
    join_pieces_kernel[grid](
        table_grad, heads, tails, tokens, ends, table_grad.stride(0), count, width, **blocks
    )
