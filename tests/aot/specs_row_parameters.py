"""The tables of the rows' parameters: numbers, and tensors as a decode loop has them."""

from aot import Spec

FLOATS = (
    "temperature", "top_p", "min_p", "tau", "reach", "noise_scale", "clamp_low", "clamp_high",
    "eps",
)  # fmt: skip
INTS = ("top_k", "seed", "position", "uid", "stream", "mode", "noise")
TENSORS = ("position", "uid", "mode")

SPECS = [
    Spec(
        "rows of parameters",
        "softgrpo_kernels.gpu.row_parameters:fill_rows_kernel",
        {
            "floats": "*fp32", "ints": "*i64", "rows": "i32", **dict.fromkeys(FLOATS, "fp32"),
            **dict.fromkeys(INTS, "i32"), "seed": "i64", **dict.fromkeys(TENSORS, "*i64"),
        },
        {
            "TENSORS": sum(1 << [*FLOATS, *INTS].index(name) for name in TENSORS),
            "BLOCK": 256,
        },
    ),
]  # fmt: skip
