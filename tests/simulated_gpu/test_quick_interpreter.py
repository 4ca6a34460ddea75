"""What was made quicker in Triton's interpreter: the same values."""

import pytest
import torch

from simulated_gpu.found import REAL

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(REAL, reason="the kernels are compiled")


@triton.jit
def plus_one(x):
    return x + 1


@triton.jit
def sort_kernel(sums, total, top, x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    values = tl.load(x + row[:, None] * COLUMNS + column[None, :])
    tl.store(sums + row, tl.xor_sum(values, 1))
    tl.store(total, tl.xor_sum(tl.reshape(values, [ROWS * COLUMNS]), 0))
    largest = tl.topk(tl.reshape(values, [ROWS * COLUMNS]), 4)
    tl.store(top + tl.arange(0, 4), plus_one(plus_one(largest)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_exclusive_or_and_what_sorts_by_it(dtype):
    x = torch.randint(-(2**31), 2**31, (8, 16)).to(dtype)
    sums, total, top = x.new_empty(8), x.new_empty(1), x.new_empty(4)
    for _ in range(2):  # the language is as it was after a launch
        sort_kernel[(1,)](sums, total, top, x, ROWS=8, COLUMNS=16)
        expected = x[:, 0].clone()
        for column in x.T[1:]:
            expected ^= column
        assert torch.equal(sums, expected)
        every = int(expected[0])
        for number in expected[1:].tolist():
            every ^= number
        assert total.item() == every
        assert torch.equal(top, x.flatten().topk(4).values + 2)
