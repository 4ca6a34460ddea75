"""Triton's interpreter without its waste: the same values in a third of the time.

Two things took most of it, neither of them the kernels' work. `tl.sort` and `tl.topk` exclude-or
each pair of keys by a reduction that the interpreter runs as Python, number by number; NumPy has
it. And every call of a device function looks through all names of Triton's language for those to
replace, which the launch has done already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock


def install() -> None:
    """For the rest of the process; does nothing where there is no Triton."""
    try:
        from triton.runtime import interpreter
    except ImportError:  # not every platform has one
        return
    interpreter.ReduceOps.apply_impl = _by_numpy(interpreter.ReduceOps.apply_impl)
    interpreter.GridExecutor.__call__ = _replacing_once(interpreter.GridExecutor.__call__)


def _by_numpy(apply_impl: Callable[..., Any]) -> Callable[..., Any]:
    import numpy as np
    import triton.language as tl

    def apply(self: Any, inputs: tuple[Any, ...]) -> Any:
        if self.combine_fn is not tl.standard._xor_combine:
            return apply_impl(self, inputs)
        (x,) = inputs
        data = np.bitwise_xor.reduce(x.handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(data, x.dtype)

    return apply


def _replacing_once(launch: Callable[..., None]) -> Callable[..., None]:
    import triton.language as tl
    from triton.runtime import interpreter

    replace = interpreter._patch_lang

    def launch_replacing_once(self: Any, *args: Any, **kwargs: Any) -> None:
        scopes: dict[frozenset[str], Any] = {}

        def replace_once(function: Any) -> Any:
            names = function.__globals__.values()
            modules = frozenset(x.__name__ for x in names if x is tl or x is tl.core)
            if modules not in scopes:
                scopes[modules] = replace(function)
            return scopes[modules]

        with mock.patch.object(interpreter, "_patch_lang", replace_once):
            launch(self, *args, **kwargs)

    return launch_replacing_once
