"""Mixtures of embeddings."""

from aot import Spec

SPECS = [
    Spec(
        "soft embedding",
        "softgrpo_kernels.gpu.soft_embedding:soft_embedding_kernel",
        {
            "out": "*bf16", "ids": "*i32", "weights": "*fp32", "table": "*bf16",
            "table_stride": "i32", "slots": "i32", "width": "i32",
        },
        {"BLOCK_H": 512},
        divisible=("table_stride", "width"),
        no_fma=True,
    ),
]  # fmt: skip
