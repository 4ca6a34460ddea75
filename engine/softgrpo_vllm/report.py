"""The record of a step as the logprobs that vLLM gives back."""

from __future__ import annotations

import torch
from torch import Tensor

from softgrpo_kernels import SoftToken


def report(
    ids: Tensor, logprobs: Tensor, ranks: Tensor, row_B: Tensor, drawn: SoftToken, flags_B: Tensor
) -> None:
    """Writes rows of vLLM's tables: ids int [R, C + 1], logprobs float32 [R, C + 1], ranks [R].

    Column 0: the token and its log p. Then the candidates and their g', best first. Columns without
    a candidate: -inf, at ids that are none, for a later entry of an id would count. The rank is
    flags_B, int64, see `softgrpo_vllm.flags`. row_B: int64, which rows they are.
    """
    if logprobs.is_cuda and ids.is_contiguous() and logprobs.is_contiguous():
        from softgrpo_vllm.gpu import report as gpu

        return gpu.report(ids, logprobs, ranks, row_B, drawn, flags_B)
    count = logprobs.shape[1] - 1
    ids_BK, g_BK = drawn.ids[:, :count], drawn.gprime[:, :count]
    if count > ids_BK.shape[1]:
        more = ids_BK.new_full((len(ids_BK), count - ids_BK.shape[1]), -1)
        ids_BK = torch.cat([ids_BK, more], dim=1)
        g_BK = torch.cat([g_BK, torch.full_like(more, -torch.inf, dtype=g_BK.dtype)], dim=1)
    spare = torch.arange(2 * count, device=ids_BK.device, dtype=ids_BK.dtype)
    taken = (ids_BK[:, None, :] == spare[:, None]).any(-1)  # [B, 2 count]
    free_BK = taken.to(torch.uint8).argsort(dim=1, stable=True)[:, :count].to(ids_BK.dtype)
    ids_BK = torch.where(ids_BK < 0, free_BK, ids_BK)
    ids[row_B] = torch.cat([drawn.token[:, None], ids_BK], dim=1).to(ids.dtype)
    logprobs[row_B] = torch.cat([drawn.token_logp[:, None], g_BK], dim=1)
    ranks[row_B] = flags_B.to(ranks.dtype)
    return None
