"""Attention with the shapes of Qwen2.5 1.5B (groups of 6), SmolLM2 (groups of 3), and of fp32."""

from aot import Spec

GPU = "softgrpo_engine.ops.gpu.paged_attention"


def attention(dtype, dim, group, kind, name=""):
    pages = {"k_pages": f"*{dtype}", "v_pages": f"*{dtype}", "block_table": "*i32"}
    common = {"out": f"*{dtype}", "q": f"*{dtype}", **pages, "seq_lens": "*i32", "scale": "fp32"}
    common |= dict.fromkeys(("table_width", "num_kv_heads"), "i32")
    narrow = dtype == "bf16"
    sizes = {"GROUP": group, "PAGE": 16, "DIM": dim, "BLOCK_D": dim}
    absent = {}
    if kind == "prefill":
        common |= {"query_starts": "*i32", "sequences": "i32"}
        sizes |= {"ROWS": 64, "KEYS": 64} if narrow else {"ROWS": 32, "KEYS": 32}
    else:
        absent = dict.fromkeys(("sums", "statistics")) if kind == "one split" else {}
        common |= {"sums": "*fp32", "statistics": "*fp32", "splits": "i32"}
        sizes |= {"ROWS": 16, "SPLIT": 512, "ONE_SPLIT": kind == "one split"}
        sizes["KEYS"] = 128 if narrow else 32
    return Spec(
        f"attention {kind} {dtype} {dim} {name}".rstrip(),
        f"{GPU}:{'prefill' if kind == 'prefill' else 'decode'}_kernel",
        {name: kind for name, kind in common.items() if name not in absent},
        sizes | absent,
        num_warps=8 if dim == 128 and (kind == "prefill" or not narrow) else 4,
        num_stages=2,
        fp_fusion=True,
        wide_loads=2,
        dot=narrow,
    )


SPECS = [
    *(attention("bf16", 128, 6, kind) for kind in ("decode", "one split", "prefill")),
    *(attention("bf16", 64, 3, kind) for kind in ("decode", "prefill")),
    attention("bf16", 64, 1, "decode", name="no groups"),
    *(attention("fp32", 64, 3, kind) for kind in ("decode", "prefill")),
    *(attention("fp32", 128, 6, kind) for kind in ("decode", "prefill")),
    Spec(
        "attention join",
        f"{GPU}:join_kernel",
        {
            "out": "*bf16", "sums": "*fp32", "statistics": "*fp32", "seq_lens": "*i32",
            "num_heads": "i32", "splits": "i32",
        },
        {"DIM": 128, "BLOCK_D": 128, "SPLIT": 512},
        num_warps=1,
        fp_fusion=True,
    ),
]  # fmt: skip
