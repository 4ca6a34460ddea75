"""A stand-in in vectorised torch for every Triton kernel that is launched.

`STAND_INS["rms_norm.rms_norm_kernel"](grid, out=..., x=..., ...)` takes the launch's own arguments,
CPU tensors, and leaves in their memory what the kernel would leave there: our wrappers
run as they are, with their allocations, grids and strides, at the speed of a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from . import (
    full_vocabulary,
    gumbel_noise,
    indexed_dot,
    linear_logprob,
    lm_head,
    mixture,
    paged_attention,
    rms_norm,
    rope_store_kv,
    rotate_heads,
    row_parameters,
    sample,
    silu_mul,
    soft_embedding,
    statistics,
)

MODULES: tuple[ModuleType, ...] = (
    full_vocabulary, gumbel_noise, indexed_dot, linear_logprob, lm_head, mixture,
    paged_attention, rms_norm, rope_store_kv, rotate_heads, row_parameters,
    sample, silu_mul, soft_embedding, statistics,
)  # fmt: skip

STAND_INS: dict[str, Callable[..., None]] = {
    f"{module.__name__.rpartition('.')[2]}.{name}": function
    for module in MODULES
    for name, function in vars(module).items()
    if name.endswith("_kernel")
}
