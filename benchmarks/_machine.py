"""What a measurement ran on, and what that machine can do at best."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from softgrpo_engine.ops.extension import cpu_extension
from softgrpo_engine.ops.linear import product_dtype

_ISA = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512f", "avx2", "asimd", "bf16")


def hardware(device: torch.device) -> dict[str, Any]:
    """Names and sizes, with measured rates of the device: its GEMM for bf16 and a copy; of a CPU
    with our kernels also what no program exceeds: products in registers, reads of memory."""
    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": _isa(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    facts["bf16_gemm_gflops"] = round(gemm_gflops(device), 1)
    facts["memory_gb_per_s"] = round(memory_gb_per_s(device), 1)
    if device.type == "cpu" and cpu_extension() is not None:
        facts["register_gflops"] = round(register_gflops(), 1)
        facts["memory_read_gb_per_s"] = round(memory_read_gb_per_s(), 1)
    return facts


def register_gflops(seconds: float = 2.0) -> float:
    """What all threads multiply in registers, with the instruction of our bf16 product: the best of
    two seconds of short runs, because a neighbour on the machine takes from the long ones, and two
    threads that begin on one core stay there for a while."""
    multiply = cpu_extension().multiply_in_registers
    operations = multiply(1)
    count = max(1, round(2e8 / operations)) * torch.get_num_threads()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, seconds_of(lambda: multiply(count), torch.device("cpu")))
    return operations * count / best / 1e9


def memory_read_gb_per_s(bytes_: int = 2**30, tries: int = 10) -> float:
    """All threads read 1 GiB, the best of ten."""
    source = torch.zeros(bytes_ // 4)
    read = cpu_extension().read_memory
    best = min(
        seconds_of(lambda: read(source.data_ptr(), bytes_), torch.device("cpu"))
        for _ in range(tries)
    )
    return bytes_ / best / 1e9


def versions() -> dict[str, str]:
    """Versions of what was measured, with the commit of this checkout."""
    names = ("softgrpo", "torch", "transformers", "numpy")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), **found, "commit": _commit()}


def gemm_gflops(device: torch.device, size: int | None = None) -> float:
    """[size, size] @ [size, size].T, as a linear layer multiplies bf16 in training (as float32 on a
    CPU without bf16 instructions), the best of ten."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    a, b = (x.to(product_dtype(x)) for x in (a, b))
    seconds = min(seconds_of(lambda: a @ b.T, device) for _ in range(10))
    return 2 * size**3 / seconds / 1e9


def memory_gb_per_s(device: torch.device) -> float:
    """Copy of 256 MiB (of a GPU 2 GiB), bytes read plus bytes written, the best of ten."""
    bytes_ = 2**31 if device.type == "cuda" else 2**28
    source = torch.zeros(bytes_, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = min(seconds_of(lambda: target.copy_(source), device) for _ in range(10))
    return 2 * bytes_ / seconds / 1e9


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, the device's work included."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def spread(values: list[float]) -> float:
    """(largest - smallest) / median: how far repeated measurements lie apart."""
    return (max(values) - min(values)) / median(values)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_info(key: str) -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith(key):
                return line.split(":", 1)[1].strip()
    return ""


def cpu_name() -> str:
    """The model, as the system tells it."""
    return _cpu_info("model name") or platform.processor() or platform.machine()


def device_name() -> str:
    """Of the GPU where there is one, else of the CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()


def _isa() -> list[str]:
    flags = set((_cpu_info("flags") or _cpu_info("Features")).split())
    return [name for name in _ISA if name in flags]


def _commit() -> str:
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip()
