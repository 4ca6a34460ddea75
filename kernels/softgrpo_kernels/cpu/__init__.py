"""The ops in C++: tensors to addresses. What they point into lives until the return."""

from __future__ import annotations

from types import ModuleType

from softgrpo_kernels.extension import cpu_extension


def kernels() -> ModuleType:
    """The extension; `backend_of` has seen that it is there."""
    found = cpu_extension()
    assert found is not None
    return found
