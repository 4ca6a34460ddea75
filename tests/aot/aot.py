"""Compiles the Triton kernels for GPUs this machine does not have and reads the machine code.

`python tests/aot/aot.py [part of a name ...]` compiles specs of the files specs_*.py and
aot_controls.py beside it, those that are named for every target, and prints one JSON object: "code"
{name: {target: facts}} and "variants" {name: {variant: failure or null}}, see aot_variants.py. It
runs in a process of its own, because the tests import Triton as an interpreter.

A module of specs needs no Triton:

    from aot import Spec

    SPECS = [
        Spec(
            "copy bf16",
            "softgrpo_kernels.gpu.copy:copy_kernel",
            {"out": "*bf16", "x": "*bf16", "stride": "i64", "size": "i32"},
            {"BLOCK": 4096},
            divisible=("stride", "size"),
            wide_loads=1,
        )
    ]
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
# Backend, architecture, lanes of a warp; the largest shared memory of one block, in bytes.
TARGETS = {
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "sm_100": ("cuda", 100, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}
Facts = dict[str, Any]


@dataclass(frozen=True)
class Spec:
    """One kernel with the types and constants that it is launched with, and what must hold.

    Attributes:
        name: unique among all specs.
        kernel: "module:function".
        signature: Triton type of every argument that is no constant ("*bf16", "i64", "fp32").
            Pointers count as 16-byte aligned.
        constexprs: the constants, and None for pointers that are absent.
        divisible: integer arguments known to be multiples of 16 at the launch.
        fp_fusion: may a * b + c become one operation.
        wide_loads: at least so many 128-bit loads (64 bits on AMD), and none of 8 or 16 bits, but
            for narrow_loads of single numbers.
        no_fma: neither Triton nor the assembler fused anything (noise: the same bits everywhere).
            Where the kernel divides, the assembler's own expansion of that is not held against it.
        dot: tensor cores are used (on sm_90: HGMMA).
    """

    name: str
    kernel: str
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    fp_fusion: bool = False
    wide_loads: int = 0
    narrow_loads: int = 0
    no_fma: bool = False
    dot: bool = False
    targets: tuple[str, ...] = tuple(TARGETS)

    def options(self) -> dict[str, Any]:
        """What the launch says beside the arguments."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": self.fp_fusion,
        }


def specs(*, thorough: bool = False) -> list[Spec]:
    """The specs of all files specs_*.py, by name of file. The first of a kernel is compiled for all
    of its targets; the others, unless thorough, for one: the rest took minutes."""
    found = [s for path in sorted(FOLDER.glob("specs_*.py")) for s in _load(path.stem).SPECS]
    first = {spec.kernel: spec for spec in reversed(found)}
    return [
        spec if thorough or spec is first[spec.kernel] else replace(spec, targets=("sm_90",))
        for spec in found
    ]


def violations(spec: Spec, target: str, facts: Facts) -> list[str]:
    """What is wrong with the compiled kernel, in words; empty when nothing is."""
    if "error" in facts:
        return [f"does not compile:\n{facts['error']}"]
    stack = 16 if target == "sm_100" else 0
    wrong = []
    if facts["stack"] > stack:
        wrong.append(f"spills: {facts['stack']} bytes of stack ({facts['registers']} registers)")
    if facts["spills"] and not 0 < facts["stack"] <= stack:
        wrong.append(f"spills: {facts['spills']} instructions or registers")
    if facts["shared"] > TARGETS[target][3]:
        wrong.append(f"shared memory: {facts['shared']} bytes of {TARGETS[target][3]}")
    if spec.wide_loads and facts["narrow_loads"] > spec.narrow_loads:
        wrong.append(f"loads of 8 or 16 bits: {facts['narrow_loads']}")
    if facts["wide_loads"] < spec.wide_loads:
        wrong.append(f"128-bit loads: {facts['wide_loads']}, expected {spec.wide_loads} or more")
    if spec.no_fma and facts["fused"]:
        wrong.append(f"fused multiply-adds asked for: {facts['fused']}")
    if spec.no_fma and facts["fma"] and not facts["divisions"]:
        wrong.append(f"fused multiply-adds in the machine code: {facts['fma']}")
    if spec.dot and not facts["matrix"]:
        wrong.append("no tensor-core instruction")
    return wrong


def compile_spec(spec: Spec, target: str) -> Facts:
    """Compiles (or takes from Triton's cache) and measures; a failure becomes facts["error"]."""
    start = time.perf_counter()
    try:
        facts = _compile(spec, target)
    except Exception:
        facts = {"error": traceback.format_exc(limit=-3)}
    return facts | {"seconds": round(time.perf_counter() - start, 2)}


def kernel_of(spec: Spec) -> Any:
    """The kernel itself."""
    module, name = spec.kernel.split(":")
    return getattr(importlib.import_module(module), name)


def source_of(spec: Spec) -> Any:
    """What Triton compiles: the kernel with the types and constants of the spec."""
    from triton.compiler import ASTSource

    kernel = kernel_of(spec)
    signature = {arg: spec.signature.get(arg, "constexpr") for arg in kernel.arg_names}
    aligned = [
        i for i, (arg, kind) in enumerate(signature.items())
        if kind.startswith("*") or arg in spec.divisible
    ]  # fmt: skip
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    return ASTSource(kernel, signature, constexprs=spec.constexprs, attrs=attributes)


def _compile(spec: Spec, target: str) -> Facts:
    import triton
    from triton.backends.compiler import GPUTarget

    backend, arch, warp, _ = TARGETS[target]
    compiled = triton.compile(
        source_of(spec), target=GPUTarget(backend, arch, warp), options=spec.options()
    )
    read = _read_cuda if backend == "cuda" else _read_hip
    return {"shared": compiled.metadata.shared} | read(compiled.asm)


def _read_cuda(asm: dict[str, Any]) -> Facts:
    usage = _cuobjdump(asm["cubin"], "-res-usage")
    sass = _cuobjdump(asm["cubin"], "-sass")
    # Address, optional predicate, instruction.
    ops = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", sass, re.M))

    def count(pattern: str) -> int:
        return sum(n for op, n in ops.items() if re.match(pattern, op))

    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "stack": int(re.findall(r"STACK:(\d+)", usage)[0]),
        "spills": count(r"STL|LDL"),
        # Plain, asynchronous to shared memory, and by the tensor memory accelerator.
        "wide_loads": count(r"LDG\S*\.(128|256)\b|LDGSTS\S*\.128\b|UTMALDG"),
        "narrow_loads": count(r"LDG\S*\.[US](8|16)\b"),
        "fused": len(re.findall(r"\bfma\.\S*f32", asm["ptx"])),
        # FFMA, FFMA2, FHFMA; HFMA2 also moves constants.
        "fma": count(r"F\w*FMA|DFMA"),
        "divisions": len(re.findall(r"\b(?:div|sqrt|rcp)\.\S*f(?:32|64)", asm["ptx"])),
        "matrix": count(r"HMMA|HGMMA|QGMMA|UTCHMMA|UTCQMMA|IMMA"),
        "instructions": sum(ops.values()),
        "barriers": count(r"BAR\b"),
        "ops": {
            op: n for op, n in sorted(ops.items()) if re.match(r"LD|ST|UTMA|.*MMA|F\w*FMA", op)
        },
    }


def _cuobjdump(cubin: bytes, flag: str) -> str:
    """The tool comes with Triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), flag, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _read_hip(asm: dict[str, Any]) -> Facts:
    code, llir = asm["amdgcn"], asm["llir"]
    ops = Counter(re.findall(r"^\s+([a-z]\w+)(?=\s)", code, re.M))

    def count(pattern: str) -> int:
        return sum(n for op, n in ops.items() if re.match(pattern, op))

    def number(key: str) -> int:
        return int(re.findall(rf"\.{key}:\s+(\d+)", code)[0])

    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        # Scalar registers spill into lanes of vector registers, not into memory: the stack tells.
        "spills": number("vgpr_spill_count"),
        # Of 64 bits too: the warp is twice as wide.
        "wide_loads": count(r"(global|buffer|flat)_load_(dwordx[24]|b64|b128)"),
        "narrow_loads": count(
            r"(global|buffer|flat)_load_([us]byte|[us]short|short|[ui](8|16)|d16)"
        ),
        "fused": len(re.findall(r"@llvm\.fm(?:a|uladd)\b|\bfmul contract\b", llir)),
        "fma": count(r"v_(pk_)?(fma|fmac|mad|mac)(mk|ak)?_f(32|64)"),
        "divisions": len(re.findall(r"\bfdiv\b|llvm\.sqrt|amdgcn\.rcp", llir)),
        "matrix": count(r"v_mfma"),
        "instructions": sum(ops.values()),
        "ops": {
            op: n for op, n in sorted(ops.items()) if re.match(r"\w+_load|\w+_store|v_mfma", op)
        },
    }


def _load(name: str) -> Any:
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    return importlib.import_module(name)


def main(names: list[str]) -> None:
    # Before the pool starts: its processes inherit both.
    os.environ.pop("TRITON_INTERPRET", None)
    controls = _load("aot_controls")
    chosen = specs(thorough=bool(names)) + [spec for spec, _ in controls.CONTROLS]
    chosen = [s for s in chosen if not names or any(part in s.name for part in names)]
    code: dict[str, dict[str, Facts]] = {}
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        aot_variants = _load("aot_variants")
        others = {
            s.name: pool.submit(aot_variants.failures, s)
            for s in [*aot_variants.distinct(specs()), *controls.VARIANTS]
            if not names or any(part in s.name for part in names)
        }
        running = [(s, t, pool.submit(compile_spec, s, t)) for s in chosen for t in s.targets]
        for spec, target, facts in running:
            code.setdefault(spec.name, {})[target] = facts.result()
        variants = {name: found.result() for name, found in others.items()}
    json.dump({"code": code, "variants": variants}, sys.stdout, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
