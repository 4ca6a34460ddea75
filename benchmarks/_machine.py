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

_ISA = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd", "bf16")


def hardware(device: torch.device) -> dict[str, Any]:
    """Names and sizes, with the measured bf16 GEMM rate and memory bandwidth of the device."""
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
    return facts


def versions() -> dict[str, str]:
    """Versions of what was measured, with the commit of this checkout."""
    names = ("softgrpo", "torch", "transformers", "numpy")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), **found, "commit": _commit()}


def gemm_gflops(device: torch.device, size: int = 2048) -> float:
    """bf16 [size, size] @ [size, size].T, as a linear layer multiplies, the best of ten; of smaller
    matrices where that takes long (PyTorch has no fast bf16 product for CPUs without AVX-512)."""
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    while size > 256:
        small = a[: size // 8, : size // 8].contiguous()
        if 512 * seconds_of(lambda x=small: x @ x.T, device) < 2.0:  # type: ignore[misc]
            break
        size //= 2
        a, b = (x[:size, :size].contiguous() for x in (a, b))
    seconds = min(seconds_of(lambda: a @ b.T, device) for _ in range(10))
    return 2 * size**3 / seconds / 1e9


def memory_gb_per_s(device: torch.device, bytes_: int = 2**28) -> float:
    """Copy of 256 MiB, bytes read plus bytes written, the best of ten."""
    source = torch.zeros(bytes_, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
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


def _isa() -> list[str]:
    flags = set((_cpu_info("flags") or _cpu_info("Features")).split())
    return [name for name in _ISA if name in flags]


def _commit() -> str:
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip()
