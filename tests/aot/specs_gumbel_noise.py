"""The noise: its op, and the device functions that other kernels inline."""

import sys
from pathlib import Path

from aot import Spec

sys.path.append(str(Path(__file__).parents[1] / "kernels" / "gpu"))  # test_noise

KEYS = {"seed": "*i64", "position": "*i64", "uid": "*i64", "stream": "*i64"}


def noise(kind):
    """The device functions that the draw kernel inlines beside a library's exp and log."""
    return Spec(
        f"{kind} noise",
        "test_noise:draw_kernel",
        {"out": "*fp32", "ids": "*i32", "shapes": "*fp32", **KEYS},
        {"KIND": kind},
        no_fma=True,
    )


SPECS = [
    noise("normal"),
    noise("log_gamma"),
    Spec(
        "gumbel noise",
        "softgrpo_kernels.gpu.gumbel_noise:gumbel_noise_kernel",
        {"out": "*fp32", "ids": "*i32", **KEYS, "slots": "i32"},
        {"BLOCK": 256},
        no_fma=True,
    ),
]
