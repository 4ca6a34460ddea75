"""The activation of SwiGLU, and its backward pass."""

from aot import Spec

TENSORS = dict.fromkeys(("gate", "up"), "*bf16") | {"stride": "i32", "width": "i32"}

SPECS = [
    Spec(
        "silu mul",
        "softgrpo_engine.ops.gpu.silu_mul:silu_mul_kernel",
        {"out": "*bf16", **TENSORS},
        {"BLOCK_I": 512},  # four numbers a thread: loads of 64 bits
        divisible=("stride", "width"),
        no_fma=True,
    ),
    Spec(
        "silu mul backward",
        "softgrpo_engine.ops.gpu.silu_mul:silu_mul_backward_kernel",
        {"d_gate_up": "*bf16", "d_out": "*bf16", **TENSORS},
        {"BLOCK_I": 1024},
        divisible=("stride", "width"),
        wide_loads=3,
        fp_fusion=True,
    ),
]
