"""The norm of Qwen2.5 1.5B, with a residual and without, of one element, and its backward pass."""

from aot import Spec


def rms_norm(dtype, residual, width=1536, weight=None):
    signature = dict.fromkeys(("out", "total", "x", "residual"), f"*{dtype}")
    signature["weight"] = f"*{weight or dtype}"
    absent = {} if residual else dict.fromkeys(("total", "residual"))
    return Spec(
        f"rms norm {dtype}{' residual' if residual else ''}{'' if width > 1 else ' of one'}"
        f"{' master' if weight else ''}",
        "softgrpo_engine.ops.gpu.rms_norm:rms_norm_kernel",
        {n: k for n, k in signature.items() if n not in absent} | {"width": "i32", "eps": "fp32"},
        {"RESIDUAL": residual, "BLOCK_H": 1 << (width - 1).bit_length(), **absent},
        divisible=("width",) if width % 16 == 0 else (),
        wide_loads=0 if width % 16 else 3 if residual else 2,
        num_warps=8,
        no_fma=True,
    )


def backward(dtype, weight, *, trained, width=1536):
    """Of a master weight or one of the computation's dtype."""
    signature = dict.fromkeys(("d_total", "d_out", "d_sum", "total"), f"*{dtype}")
    signature |= {"weight": f"*{weight}", "rows": "i32", "width": "i32", "eps": "fp32"}
    absent = {} if trained else {"d_weights": None, "d_sum": None}
    signature |= {"d_weights": "*fp32"}
    block = 1 << (width - 1).bit_length()
    return Spec(
        f"rms norm backward {dtype} weight {weight} of {width}{' trained' if trained else ''}",
        "softgrpo_engine.ops.gpu.rms_norm:rms_norm_backward_kernel",
        {n: k for n, k in signature.items() if n not in absent},
        {"SUM": trained, "WEIGHT": trained, "BLOCK_H": block, **absent},
        divisible=("width",),
        wide_loads=3 if trained else 2,
        num_warps=8 if block <= 4096 else 16,
        fp_fusion=True,
    )


SPECS = [
    rms_norm("bf16", True),
    rms_norm("fp32", False),
    rms_norm("bf16", True, width=1),
    rms_norm("bf16", True, weight="fp32"),
    backward("bf16", "fp32", trained=True),
    backward("bf16", "bf16", trained=False),
    backward("bf16", "fp32", trained=True, width=8192),
]
