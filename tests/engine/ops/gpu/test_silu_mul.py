"""The activation in Triton: the reference's bits, up to exp."""

import pytest
import torch
from almost_bitwise import assert_close

from softgrpo_engine.ops import gpu, reference

DTYPES = [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:overflow")  # NumPy's, under the interpreter
@pytest.mark.parametrize(("rows", "width"), [(3, 1536), (2, 50), (1, 1)])
def test_silu_mul(device, rows, width, dtype):
    gate_up = (4 * torch.randn(rows, 2 * width, device=device)).to(dtype)
    gate_up[0, 0] = -120.0  # exp overflows
    assert_close(gpu.silu_mul(gate_up), reference.silu_mul(gate_up))


def test_no_rows(device):
    assert gpu.silu_mul(torch.empty(0, 8, device=device)).shape == (0, 4)
