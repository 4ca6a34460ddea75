"""The op gumbel_noise in Triton: the bits of the plain one and of the golden file."""

import json
from pathlib import Path

import pytest
import torch

from softgrpo_kernels import noise as plain
from softgrpo_kernels.gpu.gumbel_noise import gumbel_noise

GOLDEN = json.loads((Path(__file__).parents[1] / "golden_noise.json").read_text())
KEYS = ("seed", "position", "uid", "stream")


@pytest.mark.parametrize("row", GOLDEN["rows"])
def test_golden_bits(device, row):
    ids = torch.tensor(GOLDEN["ids"], dtype=torch.int32, device=device)
    keys = [torch.tensor(row[name], device=device) for name in KEYS]
    expected = torch.tensor([float.fromhex(x) for x in row["gumbel"]])
    assert torch.equal(gumbel_noise(ids, *keys).cpu(), expected)


def test_gumbel_has_the_bits_of_the_reference(device):
    ids = torch.randint(-3, 300_000, (6, 700), dtype=torch.int32, device=device)
    keys = torch.randint(0, 2**32, (4, 6), device=device)
    keys[0] -= 2**31
    out = gumbel_noise(ids, *keys)
    assert torch.equal(out, plain.gumbel_noise(ids, *keys))


def test_words_outside_32_bits_give_nan(device):
    ids = torch.tensor([[3, -1]] * 4, dtype=torch.int32, device=device)
    seed, zero = torch.full((4,), -1, device=device), torch.zeros(4, dtype=torch.int64)
    words = [zero.clone().to(device) for _ in range(3)]
    for i, value in enumerate((-1, 2**32, -(2**63))):
        words[i][i] = value
    out = gumbel_noise(ids, seed, *words)
    assert out[:, 0].isnan().tolist() == [True, True, True, False]
    assert not out[:, 1].any()
