"""RoPE and the KV store with heads of 128."""

from aot import Spec

SPECS = [
    Spec(
        "rope store kv",
        "softgrpo_engine.ops.gpu.rope_store_kv:rope_store_kv_kernel",
        {
            **dict.fromkeys(("q_out", "k_pages", "v_pages", "qkv"), "*bf16"),
            "cos": "*fp32", "sin": "*fp32", "slot_mapping": "*i64", "num_heads": "i32",
            "num_kv_heads": "i32",
        },
        {"PAGE": 16, "DIM": 128, "BLOCK_HEADS": 8, "BLOCK_D": 64},
        num_warps=1,
        wide_loads=2,
        no_fma=True,
    ),
]  # fmt: skip
