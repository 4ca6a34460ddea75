"""What must come before PyTorch and Triton: the simulated GPU, and Triton as an interpreter."""

import functools
import os
import runpy
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # simulated_gpu, checkpoints, processes

if "PYTEST_XDIST_WORKER" in os.environ:
    # A thread for each worker, and for the processes that it starts: more would only spin.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from simulated_gpu import found  # noqa: F401, I001

import allocations
import torch

pytest_plugins = ["simulated_gpu.plugin", "tiny_llama"]


@pytest.fixture
def one_thread():
    """PyTorch computes with one thread during the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def peak_memory():
    """`allocations.peak_memory`."""
    return allocations.peak_memory


@pytest.fixture
def run_benchmark(monkeypatch):
    """run_benchmark(script, *arguments): a script of benchmarks/ in this process, which has its
    imports. The machine's rate of products is that of small ones: large ones take seconds."""
    folder = Path(__file__).parents[1] / "benchmarks"

    def run(script, *arguments):
        monkeypatch.syspath_prepend(folder)
        import _machine

        small = functools.partial(_machine.gemm_gflops, size=256)
        monkeypatch.setattr(_machine, "gemm_gflops", small)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(folder / script), run_name="__main__")

    return run
