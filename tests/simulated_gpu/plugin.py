"""pytest plugin: the fixture ``device`` runs a test on the CPU and on a GPU, simulated or real.

With no GPU to be seen (the ordinary tests) "cuda" is the simulated device. With one (make test-gpu)
it is the real one, and the test carries the mark `gpu`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from simulated_gpu import flash, quick_interpreter
from simulated_gpu.device import Device
from simulated_gpu.found import REAL, SIMULATED, WHY_NOT

if not REAL:
    quick_interpreter.install()

# A test that starts processes of its own, which see no simulated device.
ON_THE_CPU = pytest.mark.parametrize("device", ["cpu"], indirect=True)
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu] if REAL else [])


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that the program finds: the CPU, or a GPU."""
    if request.param == "cuda" and not REAL:
        request.getfixturevalue("simulated_gpu")
    return torch.device(request.param)


@pytest.fixture(params=[CUDA])
def gpu(request: pytest.FixtureRequest) -> torch.device:
    """A GPU, simulated or real."""
    if not REAL:
        request.getfixturevalue("simulated_gpu")
    return torch.device(request.param)


@pytest.fixture
def simulated_gpu() -> Iterator[Device]:
    """The simulated device, visible during the test: waits and launches of it can be counted."""
    if SIMULATED is None:
        pytest.skip(str(WHY_NOT))
    flash.Rules.any_dtype = flash.Rules.paged_by_any_size = False
    with SIMULATED.visible() as device:
        yield device


@pytest.fixture
def float32_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the simulated device train in float32, which no flash attention does: to compare it with
    the CPU both look away."""
    if REAL:
        pytest.skip("flash attention takes no float32")
    from softgrpo_engine.training import group_attention

    flash.Rules.any_dtype = True
    dtypes = (*group_attention.FLASH_DTYPES, torch.float32)
    monkeypatch.setattr(group_attention, "FLASH_DTYPES", dtypes)
