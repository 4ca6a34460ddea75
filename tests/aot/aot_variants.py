"""The other compilations of a spec's kernel that Triton's JIT makes, and whether they lower.

For an integer argument the JIT compiles anew where it is 1, which becomes a constant (and has no
methods: `batch.to(tl.int64)` fails), where it is a multiple of 16, and otherwise; unless the kernel
lists it under `do_not_specialize`. A spec is one of these combinations; its variants follow from
the kernel and the spec: each argument equal to 1, and once every argument aligned where the spec
has it unaligned and the other way round. With the arguments that are not specialised (batch, tiles,
KV heads, slots) a batch of 1 or one KV head is the spec itself.

Machine code is read for the specs alone, which every target compiles. A variant goes as far as it
can fail by what it changes: a constant through the front end, which knows no architecture, the
alignments through the layouts of Triton's GPU dialect.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from aot import TARGETS, Spec, kernel_of, source_of

TARGET = "sm_90"


def distinct(specs: Iterable[Spec]) -> list[Spec]:
    """Of specs that differ in sizes alone the first: variants have the same types and lines."""
    first: dict[Any, Spec] = {}
    for spec in specs:
        flags = {n: c for n, c in spec.constexprs.items() if type(c) is not int}
        first.setdefault((spec.kernel, *spec.signature.items(), *flags.items()), spec)
    return list(first.values())


def variants(spec: Spec) -> Iterator[tuple[str, Spec, str]]:
    """(name, spec, last stage) of every compilation besides the spec's own."""
    kernel = kernel_of(spec)
    # A name that is no argument's is not noticed by Triton.
    assert set(kernel.do_not_specialize) <= set(kernel.arg_names), spec.kernel
    specialised = [
        parameter.name
        for parameter in kernel.params
        if spec.signature.get(parameter.name) in ("i32", "i64") and not parameter.do_not_specialize
    ]
    for name in specialised:
        one = replace(
            spec,
            signature={arg: kind for arg, kind in spec.signature.items() if arg != name},
            constexprs=spec.constexprs | {name: 1},
            divisible=tuple(arg for arg in spec.divisible if arg != name),
        )
        yield f"{name} = 1", one, "front end"
    if specialised:
        others = tuple(name for name in specialised if name not in spec.divisible)
        yield "other alignments", replace(spec, divisible=others), "ttgir"


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
