"""The C++ kernels of the ops."""

from __future__ import annotations

import functools
from types import ModuleType

from softgrpo_kernels.extension import load


@functools.cache
def cpu_extension() -> ModuleType | None:
    """The compiled module, or None (said once) where it was not built or SOFTGRPO_NO_EXT is set."""
    return load("softgrpo_engine.ops._cpu")


def compiled() -> ModuleType:
    """The compiled module, where there is one."""
    kernels = cpu_extension()
    assert kernels is not None
    return kernels
