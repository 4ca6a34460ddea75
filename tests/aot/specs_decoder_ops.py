"""Attention, norm, activation and RoPE with the shapes of Qwen2.5 1.5B (groups of 6), SmolLM2
(groups of 3) and one of fp32."""

from aot import Spec

GPU = "softgrpo_engine.ops.gpu"


def attention(dtype, dim, group, kind, name=""):
    pages = {"k_pages": f"*{dtype}", "v_pages": f"*{dtype}", "block_table": "*i32"}
    common = {"out": f"*{dtype}", "q": f"*{dtype}", **pages, "seq_lens": "*i32", "scale": "fp32"}
    common |= dict.fromkeys(("table_width", "num_kv_heads"), "i32")
    sizes = {"GROUP": group, "PAGE": 16, "DIM": dim, "BLOCK_D": dim}
    sizes["KEYS"] = 64 if dtype == "bf16" else 32
    absent = {}
    if kind == "prefill":
        common |= {"query_starts": "*i32", "sequences": "i32"}
        sizes["ROWS"] = 64 if dtype == "bf16" else 32
    else:
        absent = dict.fromkeys(("sums", "statistics")) if kind == "one split" else {}
        common |= {"sums": "*fp32", "statistics": "*fp32", "splits": "i32"}
        sizes |= {"ROWS": 16, "SPLIT": 512, "ONE_SPLIT": kind == "one split"}
    return Spec(
        f"attention {kind} {dtype} {dim} {name}".rstrip(),
        f"{GPU}.paged_attention:{'prefill' if kind == 'prefill' else 'decode'}_kernel",
        {name: kind for name, kind in common.items() if name not in absent},
        sizes | absent,
        num_warps=8 if dim == 128 else 4,
        num_stages=2,
        fp_fusion=True,
        wide_loads=2,
        dot=dtype == "bf16",
    )


def rms_norm(dtype, residual, width=1536):
    signature = dict.fromkeys(("out", "total", "x", "residual", "weight"), f"*{dtype}")
    absent = {} if residual else dict.fromkeys(("total", "residual"))
    return Spec(
        f"rms norm {dtype}{' residual' if residual else ''}{'' if width > 1 else ' of one'}",
        f"{GPU}.rms_norm:rms_norm_kernel",
        {n: k for n, k in signature.items() if n not in absent} | {"width": "i32", "eps": "fp32"},
        {"RESIDUAL": residual, "BLOCK_H": 1 << (width - 1).bit_length(), **absent},
        divisible=("width",) if width % 16 == 0 else (),
        wide_loads=0 if width % 16 else 3 if residual else 2,
        no_fma=True,
    )


SPECS = [
    *(attention("bf16", 128, 6, kind) for kind in ("decode", "one split", "prefill")),
    *(attention("bf16", 64, 3, kind) for kind in ("decode", "prefill")),
    attention("bf16", 64, 1, "decode", name="no groups"),
    *(attention("fp32", 64, 3, kind) for kind in ("decode", "prefill")),
    *(attention("fp32", 128, 6, kind) for kind in ("decode", "prefill")),
    Spec(
        "attention join",
        f"{GPU}.paged_attention:join_kernel",
        {
            "out": "*bf16", "sums": "*fp32", "statistics": "*fp32", "seq_lens": "*i32",
            "num_heads": "i32", "splits": "i32",
        },
        {"DIM": 128, "BLOCK_D": 128, "SPLIT": 512},
        num_warps=1,
        fp_fusion=True,
    ),
    rms_norm("bf16", True),
    rms_norm("fp32", False),
    rms_norm("bf16", True, width=1),
    Spec(
        "silu mul",
        f"{GPU}.silu_mul:silu_mul_kernel",
        {"out": "*bf16", "gate_up": "*bf16", "width": "i32"},
        {"BLOCK_I": 2048},
        divisible=("width",),
        wide_loads=2,
        no_fma=True,
    ),
    Spec(
        "rope store kv",
        f"{GPU}.rope_store_kv:rope_store_kv_kernel",
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
