"""Mixtures of embeddings in Triton."""

import pytest
import torch

from softgrpo_kernels.gpu.soft_embedding import soft_embedding
from softgrpo_kernels.reference import soft_embedding as reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixtures_have_the_bits_of_the_reference(device, dtype):
    # Rows further apart than they are long, and more than one block of them.
    table = torch.randn(30, 533, device=device).to(dtype)[:, 3:]
    ids = torch.randint(-2, 30, (6, 5), device=device).clamp(min=-1).int()
    weights = torch.randn(6, 5, device=device)
    weights[weights < -0.5] = 0.0
    out = soft_embedding(ids.view(2, 3, 5), weights.view(2, 3, 5), table)
    assert out.dtype == dtype
    assert torch.equal(out.view(6, -1), reference.soft_embedding(ids, weights, table))
    order = torch.randperm(6, device=device)
    assert torch.equal(soft_embedding(ids[order], weights[order], table), out.view(6, -1)[order])


def test_no_rows(device):
    ids, weights = torch.empty(0, 3, dtype=torch.int32), torch.empty(0, 3)
    table = torch.randn(5, 8, device=device)
    assert soft_embedding(ids.to(device), weights.to(device), table).shape == (0, 8)
