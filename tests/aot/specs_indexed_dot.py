"""The kernels of the training ops: bf16 weights, fp32 and bf16 gradients."""

from aot import Spec

GPU = "softgrpo_kernels.gpu.indexed_dot"
BLOCKS = {"UNUSED": 2**31 - 1, "PIECE": 128, "BLOCK_H": 256}


def sums(dtype):
    pieces = {"table_grad": f"*{dtype}", "heads": "*fp32", "tails": "*fp32", "tokens": "*i32"}
    sizes = {"table_stride": "i32", "count": "i32", "width": "i32"}
    return [
        Spec(
            f"piece sums {dtype}",
            f"{GPU}:piece_sums_kernel",
            {
                **pieces, **sizes, "pairs": "*i64", "grad": "*fp32", "hidden": "*bf16",
                "hidden_stride": "i32", "slots": "i32",
            },
            BLOCKS,
            divisible=("table_stride", "hidden_stride", "width"),
            fp_fusion=True,
        ),
        Spec(
            f"join pieces {dtype}",
            f"{GPU}:join_pieces_kernel",
            {**pieces, "ends": "*i64", **sizes},
            BLOCKS,
            divisible=("table_stride", "width"),
            fp_fusion=True,
        ),
    ]  # fmt: skip


SPECS = [
    Spec(
        "indexed dot",
        f"{GPU}:indexed_dot_kernel",
        {
            "out": "*fp32", "hidden": "*bf16", "table": "*bf16", "ids": "*i32",
            "hidden_stride": "i32", "table_stride": "i32", "slots": "i32", "width": "i32",
        },
        {"BLOCK_K": 8, "BLOCK_H": 256},
        divisible=("hidden_stride", "table_stride", "width"),
        fp_fusion=True,
    ),
    *sums("fp32"),
    *sums("bf16"),
]  # fmt: skip
