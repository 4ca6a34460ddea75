"""The other compilations of a spec's kernel that Triton's JIT makes, and whether they lower.

For an integer argument the JIT compiles anew where it is 1, which becomes a constant (and has no
methods: `batch.to(tl.int64)` fails), where it is a multiple of 16, and otherwise; unless the kernel
lists it under `do_not_specialize`. A spec is one of these combinations; its variants follow from
the kernel and the spec, each with one argument changed. With the arguments that are not specialised
(batch, tiles, KV heads, slots) a batch of 1 or one KV head is the spec itself.

Machine code is read for the specs alone, which every target compiles. A variant goes as far as it
can fail by what it changes, so that 120 of them cost a minute of one core: a constant through the
front end, which knows no architecture, an alignment through the layouts of Triton's GPU dialect.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from aot import TARGETS, Spec, kernel_of, source_of

TARGET = "sm_90"


def variants(spec: Spec) -> Iterator[tuple[str, Spec, str]]:
    """(name, spec, last stage) of every compilation besides the spec's own."""
    kernel = kernel_of(spec)
    # A name that is no argument's is not noticed by Triton.
    assert set(kernel.do_not_specialize) <= set(kernel.arg_names), spec.kernel
    for parameter in kernel.params:
        name = parameter.name
        if spec.signature.get(name) not in ("i32", "i64") or parameter.do_not_specialize:
            continue
        signature = {arg: kind for arg, kind in spec.signature.items() if arg != name}
        others = tuple(arg for arg in spec.divisible if arg != name)
        one = replace(
            spec,
            signature=signature,
            constexprs=spec.constexprs | {name: 1},
            divisible=others,
        )
        yield f"{name} = 1", one, "front end"
        if name in spec.divisible:
            yield f"{name} not aligned", replace(spec, divisible=others), "ttgir"
        else:
            aligned = replace(spec, divisible=(*spec.divisible, name))
            yield f"{name} aligned", aligned, "ttgir"


def failures(spec: Spec) -> dict[str, str | None]:
    """{variant: what went wrong, or None}."""
    return {name: _failure(variant, last) for name, variant, last in variants(spec)}


def _failure(spec: Spec, last: str) -> str | None:
    try:
        _lower(spec, last)
    except Exception:
        return traceback.format_exc(limit=-3)
    return None


def _lower(spec: Spec, last: str) -> None:
    """What `triton.compile` does, without its cache, up to the stage `last`."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    maker, arch, warp, _ = TARGETS[TARGET]
    gpu = GPUTarget(maker, arch, warp)
    backend = make_backend(gpu)
    options = backend.parse_options(spec.options())
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = source_of(spec)
    implementation, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(gpu, options, implementation, modules, context)
    if last == "front end":
        return
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    metadata = {"target": gpu, **options.__dict__}
    for stage, run in stages.items():
        module = run(module, metadata)
        if stage == last:
            return
    raise ValueError(f"no stage {last} in {list(stages)}")
