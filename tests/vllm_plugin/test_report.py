"""The kernel that reports a step writes what the reference writes."""

import pytest
import torch

from softgrpo_kernels import soft_token
from softgrpo_vllm.report import report

pytest.importorskip("triton")
from softgrpo_vllm.gpu import report as gpu


@pytest.mark.parametrize("count", [0, 3, 8, 20])  # fewer than the slots, all, and more
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_the_kernel_writes_what_the_reference_writes(count, kind):
    torch.manual_seed(0)
    # A vocabulary so small that candidates are among the ids that unused columns would take.
    drawn = soft_token(torch.randn(5, 48), top_k=torch.tensor([1, 2, 8, 5, 3]), k_max=8, mode=2)
    rows, flags = torch.tensor([6, 0, 3, 2, 5]), torch.arange(5) * 2**33
    tables = [
        (
            torch.zeros(7, count + 1, dtype=kind),
            torch.zeros(7, count + 1),
            torch.zeros(7, dtype=torch.int64),
        )
        for _ in range(2)
    ]
    report(*tables[0], rows, drawn, flags)
    gpu.report(*tables[1], rows, drawn, flags)
    for expected, found in zip(*tables, strict=True):
        assert torch.equal(found, expected)
    for row in tables[0][0][rows]:
        assert len(set(row[1:].tolist())) == count
