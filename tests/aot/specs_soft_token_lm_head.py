"""The LM head with statistics: the tied head of a 1.5B model, and one with everything."""

from aot import Spec

GPU = "softgrpo_kernels.gpu.soft_token.lm_head"


def lm_head(dtype, *, every=False):
    signature = {
        "logits": f"*{dtype}", "tile_max": "*fp32", "tile_sums": "*fp32", "hidden": f"*{dtype}",
        "hidden_stride": "i32", "weight": f"*{dtype}", "weight_stride": "i32", "bias": f"*{dtype}",
        "softcap": "fp32", "logit_scale": "fp32", "floats": "*fp32", "ints": "*i64",
        **dict.fromkeys(("batch", "vocabulary", "width", "tiles"), "i32"),
    }  # fmt: skip
    absent = {} if every else {"bias": None}
    return Spec(
        f"lm head {dtype}{' every term' if every else ''}",
        f"{GPU}:lm_head_kernel",
        {name: kind for name, kind in signature.items() if name not in absent},
        {
            "BIAS": every, "SOFTCAP": every, "ENTROPY": every, "ROWS": 64, "TILE": 128,
            "BLOCK_H": 32 if dtype == "fp32" else 64, **absent,
        },
        divisible=("hidden_stride", "weight_stride", "width", "vocabulary"),
        num_warps=8,
        fp_fusion=True,
        wide_loads=0 if every else 2,
        dot=dtype != "fp32",
    )  # fmt: skip


SPECS = [
    lm_head("bf16"),
    lm_head("bf16", every=True),
    lm_head("fp32"),
    Spec(
        "lm head combine",
        f"{GPU}:combine_kernel",
        {
            "chunk_sums": "*fp32", "count": "*i32", "histogram": "*i64", "tile_max": "*fp32",
            "tile_sums": "*fp32", "floats": "*fp32", "ints": "*i64",
            **dict.fromkeys(("batch", "tiles", "chunks"), "i32"),
        },
        {"ENTROPY": True, "TILES": 32},
        num_warps=1,
        fp_fusion=True,
    ),
]  # fmt: skip
