"""The passes of the whole-vocabulary log-probability."""

from aot import Spec

GPU = "softgrpo_kernels.gpu.linear_logprob"
ROW = {"dots": "*fp32", "bias": "*fp32", "temperature": "*fp32", "label": "*i64"}
SIZES = dict.fromkeys(("stride", "width", "begin"), "i32")
MAP = {"softcap": "fp32", "logit_scale": "fp32"}
FLAGS = {"BIAS": True, "SOFTCAP": True, "ENTROPY": True, "BLOCK": 2048}

SPECS = [
    Spec(
        "token log-probability", f"{GPU}:accumulate_kernel",
        {**ROW, "state": "*fp32", **SIZES, "rows": "i32", **MAP}, FLAGS,
        divisible=("stride", "width"), num_warps=8, fp_fusion=True, wide_loads=2,
    ),
    Spec(
        "token log-probability backward", f"{GPU}:differentiate_kernel",
        {
            **ROW, **dict.fromkeys(("lse", "entropy", "d_logp", "d_lse", "d_entropy"), "*fp32"),
            **SIZES, **MAP,
        },
        FLAGS, divisible=("stride", "width"), num_warps=8, fp_fusion=True, wide_loads=2,
    ),
]  # fmt: skip
