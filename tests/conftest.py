"""Before anything imports Triton: without a GPU its kernels run under the interpreter.

Triton reads the variable when a kernel is defined, its own library of kernels included.
"""

import itertools
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


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
