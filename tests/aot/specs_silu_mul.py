"""The activation of SwiGLU."""

from aot import Spec

SPECS = [
    Spec(
        "silu mul",
        "softgrpo_engine.ops.gpu.silu_mul:silu_mul_kernel",
        {"out": "*bf16", "gate_up": "*bf16", "width": "i32"},
        {"BLOCK_I": 512},
        divisible=("width",),
        wide_loads=2,
        no_fma=True,
    ),
]
