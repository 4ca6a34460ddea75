"""Loads C++ kernels."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType

# torch loads its libgomp first, so that the extension shares its thread pool.
import torch  # noqa: F401


@functools.cache
def cpu_extension() -> ModuleType | None:
    """The compiled module, or None (said once) where it was not built or SOFTGRPO_NO_EXT is set."""
    return load("softgrpo_kernels._cpu")


def load(name: str) -> ModuleType | None:
    """An extension module by its full name, or None with a warning."""
    if os.environ.get("SOFTGRPO_NO_EXT", "") in ("1", "true"):
        reason, remedy = "SOFTGRPO_NO_EXT is set", "Unset it to use them."
    else:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reason, remedy = str(error), "Reinstall with a C++ compiler to build them."
    package = name.partition(".")[0]
    warnings.warn(
        f"{package}: no C++ CPU kernels ({reason}); CPU tensors use the slower PyTorch "
        f"reference. {remedy}",
        stacklevel=3,
    )
    return None
