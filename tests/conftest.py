"""What must come before PyTorch and Triton: the simulated GPU, and Triton as an interpreter."""

import itertools
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # simulated_gpu

if "PYTEST_XDIST_WORKER" in os.environ:
    # A thread for each worker, and for the processes that it starts: more would only spin.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from simulated_gpu import found  # noqa: F401, I001

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
    """peak_memory(run): the most bytes that PyTorch's CPU allocator held at a time during `run()`,
    above those at its start; what operators allocate inside counts too."""

    def measure(run):
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            run()
        events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
        held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
        return max(held, default=0)

    return measure
