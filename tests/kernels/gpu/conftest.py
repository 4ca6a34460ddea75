"""The Triton kernels: on the device where there is one, else under the interpreter."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # gpu_cases

if importlib.util.find_spec("triton") is None:  # not every platform has one
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
