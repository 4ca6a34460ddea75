"""Which GPU this process has: a real one, the simulated one, or none. Import it before PyTorch."""

from __future__ import annotations

import os

from simulated_gpu import build
from simulated_gpu.visible import hide_gpus

hide_gpus()
_LOADED = build.load()

import torch  # noqa: E402

REAL = torch.cuda.is_available()
if not REAL:
    # Triton reads this when a kernel is defined, its own library of kernels included; PyTorch's
    # compiler imports it.
    os.environ["TRITON_INTERPRET"] = "1"
SIMULATED = None
WHY_NOT = "a real GPU is there: make test-gpu" if REAL else _LOADED
if not isinstance(_LOADED, str) and not REAL:
    from simulated_gpu import flash
    from simulated_gpu.device import Device

    SIMULATED = Device(_LOADED)
    _KERNELS = flash.register(SIMULATED)
