"""Kernels that the gates of aot.py must refuse, each with the word of its complaint."""

from dataclasses import replace

from aot import Spec


def _control(name, kernel, block, **fields):
    """For one GPU of each maker, unless it says otherwise."""
    arguments = {"out": "*fp32", "x": "*bf16", "size": "i32"}
    spec = Spec(f"control {name}", f"bad_kernels:{kernel}", arguments, {"BLOCK": block})
    return replace(spec, **{"targets": ("sm_90", "gfx942")} | fields)


WIDE = {"out": "*fp32", "x": "*fp32", "size": "i32"}

CONTROLS = [
    # 256 numbers a thread live across a reduction; a thread has 255 registers.
    (
        _control("spill", "scaled_by_sum", 2**13, signature=WIDE, num_warps=1, targets=("sm_90",)),
        "spills",
    ),
    # And 512 on gfx942.
    (
        _control(
            "spill hip", "scaled_by_sum", 2**15, signature=WIDE, num_warps=1, targets=("gfx942",)
        ),
        "spills",
    ),
    # The size is not known to be a multiple of 16: the mask forbids vectors.
    (_control("narrow loads", "multiply_add", 2048, wide_loads=1), "16 bits"),
    # The loads are wide enough, but too few.
    (
        _control("few loads", "multiply_add", 2048, divisible=("size",), wide_loads=10),
        "128-bit loads",
    ),
    (_control("fusion", "multiply_add", 2048, fp_fusion=True, no_fma=True), "machine code"),
    (_control("fma", "explicit_fma", 2048, no_fma=True), "asked for"),
    # Nine stages of 32 KiB.
    (_control("shared", "large_dot", 128, num_warps=8, num_stages=9, targets=("sm_90",)), "shared"),
    (_control("dot", "multiply_add", 2048, dot=True), "tensor-core"),
    (_control("compile", "broken", 16), "does not compile"),
]

# Its size is specialised and has no method where it is 1.
VARIANTS = [_control("size of one", "method_of_size", 16)]
