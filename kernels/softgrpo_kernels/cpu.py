"""The sampling ops in C++: tensors to pointers. What they point into lives until the return."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from softgrpo_kernels.rows import RowParameters
from softgrpo_kernels.step import OUTPUTS, LMHead, SoftToken

# Numbers of the dtypes in C++.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def soft_token(
    kernels: ModuleType,
    logits: Tensor,
    embed: Tensor | None,
    rows: RowParameters,
    out: SoftToken,
    *,
    terminal_ids: Tensor | None = None,
    head: LMHead | None = None,
    joint: bool = False,
) -> None:
    """See `softgrpo_kernels.reference.soft_token`."""
    logits = _unit_stride(logits)
    embed = None if embed is None else _unit_stride(embed)
    hidden = weight = bias = None
    if head is not None:
        hidden, weight = _unit_stride(head.hidden), _unit_stride(head.weight)
        bias = None if head.bias is None else head.bias.float().contiguous()
    if terminal_ids is not None:
        terminal_ids = terminal_ids.to(torch.int32).contiguous()
    kernels.soft_token(
        rows=logits.shape[0],
        vocabulary=logits.shape[1],
        k_max=rows.k_max,
        floats=rows.floats.data_ptr(),
        ints=rows.ints.data_ptr(),
        joint=int(joint),
        logits=logits.data_ptr(),
        logits_dtype=DTYPES[logits.dtype],
        logits_stride=logits.stride(0),
        terminal_ids=_address(terminal_ids),
        terminal_width=0 if terminal_ids is None else terminal_ids.shape[1],
        hidden=_address(hidden),
        hidden_stride=0 if hidden is None else hidden.stride(0),
        bias=_address(bias),
        softcap=(head.softcap or 0.0) if head is not None else 0.0,
        logit_scale=head.logit_scale if head is not None else 1.0,
        **_table("lm_head", weight),
        **_table("embed", embed),
        **{f"out_{name}": _address(getattr(out, name)) for name in OUTPUTS},
    )


def gumbel_noise(
    kernels: ModuleType, ids: Tensor, seed: Tensor, position: Tensor, uid: Tensor, stream: Tensor
) -> Tensor:
    """See `softgrpo_kernels.reference.gumbel_noise`."""
    ids = ids.to(torch.int32).contiguous()
    keys = [key.expand(ids.shape[:-1]).contiguous() for key in (seed, position, uid, stream)]
    out = torch.empty(ids.shape, dtype=torch.float32)
    kernels.gumbel_noise(
        out.data_ptr(),
        ids.data_ptr(),
        *(key.data_ptr() for key in keys),
        keys[0].numel(),
        ids.shape[-1],
    )
    return out


def soft_embedding(kernels: ModuleType, ids: Tensor, weights: Tensor, embed: Tensor) -> Tensor:
    """See `softgrpo_kernels.reference.soft_embedding`."""
    table = _unit_stride(embed)
    ids, weights = ids.to(torch.int32).contiguous(), weights.float().contiguous()
    out = embed.new_empty((*ids.shape[:-1], embed.shape[1]))
    kernels.soft_embedding(
        out.data_ptr(),
        ids.data_ptr(),
        weights.data_ptr(),
        out.numel() // max(1, out.shape[-1]),  # not from ids, which may have no slots
        ids.shape[-1],
        table.data_ptr(),
        table.stride(0),
        table.shape[1],
        DTYPES[table.dtype],
    )
    return out


def _table(name: str, table: Tensor | None) -> dict[str, int]:
    address, stride, width, dtype = (0, 0, 0, 0)
    if table is not None:
        address, stride, width = table.data_ptr(), table.stride(0), table.shape[1]
        dtype = DTYPES[table.dtype]
    values = {"": address, "_stride": stride, "_width": width, "_dtype": dtype}
    return {name + suffix: value for suffix, value in values.items()}


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _unit_stride(x: Tensor) -> Tensor:
    """x itself when its last axis is contiguous (rows may lie apart), else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
