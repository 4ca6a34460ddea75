"""The norm in Triton: the reference's bits, up to the order of a sum."""

import pytest
import torch
from almost_bitwise import assert_close

from softgrpo_engine.ops import gpu, reference

DTYPES = [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(4, 576), (3, 100), (2, 7)])
def test_rms_norm(device, rows, width, dtype):
    x, residual = torch.randn(2, rows, width, device=device).to(dtype)
    weight = (1 + 0.3 * torch.randn(width, device=device)).to(dtype)
    kept = residual.clone()
    assert_close(gpu.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    out, total = gpu.rms_norm(x, weight, 1e-5, residual)
    expected, expected_total = reference.rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(total, expected_total)
    assert_close(out, expected)
    assert torch.equal(residual, kept)
    assert torch.equal(gpu.rms_norm(x[1:2], weight, 1e-5, residual[1:2])[0], out[1:2])


def test_no_rows(device):
    x = torch.empty(0, 8, device=device)
    assert gpu.rms_norm(x, torch.ones(8, device=device), 1e-5).shape == (0, 8)
