"""The tensor that the tests of the device's rules start from."""

import pytest
import torch


@pytest.fixture
def x(simulated_gpu):
    return torch.arange(4.0, device="cuda")
