"""The kernel of discrete rows over the whole vocabulary."""

from aot import Spec
from specs_soft_token import COLLECTED, ROW

SPECS = [
    Spec(
        "collect", "softgrpo_kernels.gpu.soft_token.full_vocabulary:collect_kernel",
        {
            **COLLECTED, "chunk_sums": "*fp32", "logits": "*bf16", "stride": "i32",
            "vocabulary": "i32", "chunks": "i32", "k_max": "i32", **ROW,
        },
        {"PADDED": 64}, divisible=("stride", "vocabulary"), num_warps=16,
    ),
]  # fmt: skip
