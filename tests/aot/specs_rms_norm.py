"""The norm of Qwen2.5 1.5B, with a residual and without, and of one element."""

from aot import Spec


def rms_norm(dtype, residual, width=1536):
    signature = dict.fromkeys(("out", "total", "x", "residual", "weight"), f"*{dtype}")
    absent = {} if residual else dict.fromkeys(("total", "residual"))
    return Spec(
        f"rms norm {dtype}{' residual' if residual else ''}{'' if width > 1 else ' of one'}",
        "softgrpo_engine.ops.gpu.rms_norm:rms_norm_kernel",
        {n: k for n, k in signature.items() if n not in absent} | {"width": "i32", "eps": "fp32"},
        {"RESIDUAL": residual, "BLOCK_H": 1 << (width - 1).bit_length(), **absent},
        divisible=("width",) if width % 16 == 0 else (),
        wide_loads=0 if width % 16 else 3 if residual else 2,
        num_warps=8,
        no_fma=True,
    )


SPECS = [rms_norm("bf16", True), rms_norm("fp32", False), rms_norm("bf16", True, width=1)]
