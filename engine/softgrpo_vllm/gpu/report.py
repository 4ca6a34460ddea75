"""The record of a step as logprobs, in Triton; meaning: `softgrpo_vllm.report.report`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from softgrpo_kernels import SoftToken


@triton.jit(do_not_specialize=["slots", "count"])
def report_kernel(
    out_ids, out_logprobs, out_ranks, rows, flags, ids, gprime, token, token_logp, slots, count,
    K: tl.constexpr,
):  # fmt: skip
    """Program i: the i-th of the rows that were drawn."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + i).to(tl.int64)
    slot = tl.arange(0, K)
    ids_K = tl.load(ids + i * slots + slot, mask=slot < tl.minimum(slots, count), other=-1)
    g_K = tl.load(
        gprime + i * slots + slot, mask=slot < tl.minimum(slots, count), other=-float("inf")
    )
    # The j-th id that is no candidate, for column j.
    spare = tl.arange(0, 2 * K)
    free = tl.max((ids_K[None, :] == spare[:, None]).to(tl.int32), axis=1) == 0
    place = tl.cumsum(free.to(tl.int32), axis=0) - 1
    fits = free[:, None] & (place[:, None] == slot[None, :])
    free_K = tl.sum(tl.where(fits, spare[:, None], 0), axis=0)
    ids_K = tl.where(ids_K < 0, free_K, ids_K)
    at = row * (count + 1)
    kind_of_id = out_ids.dtype.element_ty
    tl.store(out_ids + at, tl.load(token + i).to(kind_of_id))
    tl.store(out_ids + at + 1 + slot, ids_K.to(kind_of_id), mask=slot < count)
    tl.store(out_logprobs + at, tl.load(token_logp + i))
    tl.store(out_logprobs + at + 1 + slot, g_K, mask=slot < count)
    tl.store(out_ranks + row, tl.load(flags + i))


def report(
    ids: Tensor, logprobs: Tensor, ranks: Tensor, row_B: Tensor, drawn: SoftToken, flags_B: Tensor
) -> None:
    """`softgrpo_vllm.report.report` in one launch, into contiguous tensors."""
    count, slots = logprobs.shape[1] - 1, drawn.ids.shape[1]
    report_kernel[(len(row_B),)](
        ids, logprobs, ranks, row_B, flags_B, drawn.ids, drawn.gprime, drawn.token,
        drawn.token_logp, slots, count, K=triton.next_power_of_2(max(slots, count, 1)),
    )  # fmt: skip
