"""RoPE and the copies of keys and values with heads of 128, and the backward pass."""

from aot import Spec

PLACES = {
    "cos": "*fp32", "sin": "*fp32", "copy_starts": "*i32", "copies": "*i32",
    "num_heads": "i32", "num_kv_heads": "i32",
}  # fmt: skip
SIZES = {"DIM": 128, "BLOCK_HEADS": 8, "BLOCK_D": 64}

SPECS = [
    Spec(
        "rotate heads",
        "softgrpo_engine.ops.gpu.rotate_heads:rotate_heads_kernel",
        dict.fromkeys(("q", "k", "v", "qkv"), "*bf16") | PLACES,
        SIZES,
        num_warps=1,
        wide_loads=2,
        no_fma=True,
    ),
    Spec(
        "rotate heads backward",
        "softgrpo_engine.ops.gpu.rotate_heads:rotate_heads_backward_kernel",
        dict.fromkeys(("d_qkv", "d_q", "d_k", "d_v"), "*bf16") | PLACES,
        SIZES,
        num_warps=1,
        wide_loads=6,
        fp_fusion=True,
    ),
]
