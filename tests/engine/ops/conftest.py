"""Lets the tests import what they share; every instruction set in turn."""

import sys
from pathlib import Path

import pytest

from softgrpo_engine.ops.extension import cpu_extension

sys.path.insert(0, str(Path(__file__).parent))  # attention_cases, almost_bitwise


@pytest.fixture(params=[0, 1, 2], ids=["portable", "avx2", "best"])
def each_isa(request):
    if cpu_extension() is None:
        yield
        return
    cpu_extension().limit_isa(request.param)
    yield
    cpu_extension().limit_isa(2)
