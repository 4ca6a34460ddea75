"""What the plug-in of vLLM gives back as logprobs."""

from aot import Spec

SPECS = [
    Spec(
        "vllm report",
        "softgrpo_vllm.gpu.report:report_kernel",
        {
            "out_ids": "*i64", "out_logprobs": "*fp32", "out_ranks": "*i64", "rows": "*i64",
            "flags": "*i64", "ids": "*i32", "gprime": "*fp32", "token": "*i32",
            "token_logp": "*fp32", "slots": "i32", "count": "i32",
        },
        {"K": 8},
    ),
]  # fmt: skip
