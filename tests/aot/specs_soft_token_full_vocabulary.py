"""The kernels of discrete rows over the whole vocabulary."""

from aot import Spec

GPU = "softgrpo_kernels.gpu.soft_token.full_vocabulary"
ROW = {"floats": "*fp32", "ints": "*i64", "valid": "*i1", "batch": "i32", "k_max": "i32"}
SOURCE = {
    "logits": "*bf16", "stride": "i32", "vocabulary": "i32", "listed_a": "*fp32",
    "listed_id": "*i32", "count": "*i32",
}  # fmt: skip
CHUNKS = {"chunk": "*fp32", "chunks": "i32"}
DRAWN = {"best": "*fp32", "best_id": "*i32"}
DIVISIBLE = ("stride", "vocabulary")

SPECS = [
    Spec(
        "collect", f"{GPU}:collect_kernel", {**ROW, **SOURCE, **CHUNKS}, {"PADDED": 64},
        divisible=DIVISIBLE, num_warps=8,
    ),
    Spec(
        "cut", f"{GPU}:cut_kernel",
        {**ROW, **SOURCE, **CHUNKS, "cut": "*i32", "lse": "*fp64", "out_kept_mass": "*fp32"},
        {"PADDED": 64, "JOINT": False, "KEPT_MASS": True}, divisible=DIVISIBLE, num_warps=16,
    ),
    Spec(
        "draw from the vocabulary", f"{GPU}:draw_kernel",
        {**ROW, **SOURCE, "cut": "*i32", **DRAWN}, divisible=DIVISIBLE, num_warps=8, no_fma=True,
    ),
    Spec(
        "record", f"{GPU}:record_kernel",
        {
            **ROW, "logits": "*bf16", "stride": "i32", **DRAWN, "lse": "*fp64",
            **dict.fromkeys(("out_ids", "out_n", "out_token"), "*i32"),
            **dict.fromkeys(
                ("out_gprime", "out_weights", "out_logp", "out_token_logp"), "*fp32"
            ),
        },
        divisible=("stride",), num_warps=4, no_fma=True,
    ),
]  # fmt: skip
