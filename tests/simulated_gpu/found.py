"""Which GPU this process has: a real one, the simulated one, or none. Import it before PyTorch."""

from __future__ import annotations

import os

if os.environ.get("SOFTGRPO_TEST_GPU") != "1":  # make test-gpu
    # The tests of the CPU hold on a machine with a GPU where they do not see it.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = "-1"

from simulated_gpu import build

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
