"""The Triton kernels: on the device where there is one, else under the interpreter."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from simulated_gpu.found import REAL

sys.path.insert(0, str(Path(__file__).parents[1]))  # attention_cases

if importlib.util.find_spec("triton") is None:  # not every platform has one
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu) if REAL else "cpu"])
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
