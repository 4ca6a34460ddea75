"""One soft step in C++."""

from __future__ import annotations

from torch import Tensor

from softgrpo_kernels.cpu import kernels
from softgrpo_kernels.row_parameters import RowParameters
from softgrpo_kernels.soft_token_tensors import OUTPUTS, SoftToken, SoftTokenInputs
from softgrpo_kernels.tensors import DTYPES, int32, unit_stride


def soft_token(inputs: SoftTokenInputs, rows: RowParameters, out: SoftToken) -> None:
    """See `softgrpo_kernels.reference.soft_token`."""
    assert inputs.logits is not None
    logits, terminal_ids, head = unit_stride(inputs.logits), inputs.terminal_ids, inputs.head
    embed = None if inputs.embed is None else unit_stride(inputs.embed)
    hidden = weight = bias = None
    if head is not None:
        hidden, weight = unit_stride(head.hidden), unit_stride(head.weight)
        bias = None if head.bias is None else head.bias.float().contiguous()
    if terminal_ids is not None:
        terminal_ids = int32(terminal_ids)
    kernels().soft_token(
        rows=logits.shape[0],
        vocabulary=logits.shape[1],
        k_max=rows.k_max,
        floats=rows.floats.data_ptr(),
        ints=rows.ints.data_ptr(),
        joint=int(inputs.joint),
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


def _table(name: str, table: Tensor | None) -> dict[str, int]:
    address, stride, width, dtype = (0, 0, 0, 0)
    if table is not None:
        address, stride, width = table.data_ptr(), table.stride(0), table.shape[1]
        dtype = DTYPES[table.dtype]
    values = {"": address, "_stride": stride, "_width": width, "_dtype": dtype}
    return {name + suffix: value for suffix, value in values.items()}


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
