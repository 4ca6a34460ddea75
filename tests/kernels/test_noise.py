"""Noise in plain PyTorch: its bits, their accuracy, its distributions."""

import json
import math
from pathlib import Path

import pytest
import torch
from scipy import stats

from softgrpo_kernels.noise import (
    gumbel_from_words,
    gumbel_noise,
    log_gamma_noise,
    normal_noise,
    philox4x32,
    portable_log,
)

GOLDEN = json.loads((Path(__file__).parent / "golden_noise.json").read_text())
IDS = torch.tensor(GOLDEN["ids"], dtype=torch.int32)
SHAPES = torch.tensor(GOLDEN["gamma_shapes"])
KEY_NAMES = ("seed", "position", "uid", "stream")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def bits(values):
    return torch.tensor([float.fromhex(x) for x in values], dtype=torch.float32)


def test_philox_known_answer():
    zero = torch.tensor(0)
    words = philox4x32((zero,) * 4, (zero,) * 2)
    assert [int(w) for w in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    # All bits set, from the test vectors of Random123.
    ones = torch.tensor(0xFFFFFFFF)
    words = philox4x32((ones,) * 4, (ones,) * 2)
    assert [int(w) for w in words] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("row", GOLDEN["rows"])
def test_golden_bits_of_the_other_kinds(row):
    keys = [torch.tensor(row[name]) for name in KEY_NAMES]
    assert torch.equal(gumbel_noise(IDS, *keys, 3), bits(row["gumbel_of_draw_3"]))
    assert torch.equal(normal_noise(IDS, *keys), bits(row["normal"]))
    assert torch.equal(log_gamma_noise(IDS, SHAPES, *keys), bits(row["log_gamma"]))


def test_error_against_fp64_of_the_same_uniform():
    r0, r1 = torch.randint(0, 2**32, (2, 2_000_000))
    # Both ends, where log1p and log are hardest.
    r0[:200_000] >>= torch.randint(0, 32, (200_000,))
    r0[200_000:400_000] = 2**32 - 1 - (r0[200_000:400_000] >> 20)
    g = gumbel_from_words(r0, r1).double()
    low = ((r1 >> 9).float() + 0.5) * 2.0**-23
    v = (((r0 >> 9).float() + low) * 2.0**-23).clamp(max=1 - 2.0**-24).double()
    exact = -torch.log(-torch.log1p(-v))
    assert ((g - exact).abs() / exact.abs().clamp(min=1)).max() < 5e-7
    assert g.min() > -2.82


def test_range_of_the_noise():
    smallest_and_largest = gumbel_from_words(
        torch.tensor([2**32 - 1, 0]), torch.tensor([2**32 - 1, 0])
    )
    assert smallest_and_largest[0] == pytest.approx(-math.log(24 * math.log(2)), rel=1e-6)
    assert smallest_and_largest[1] == pytest.approx(47 * math.log(2), rel=1e-6)


def test_portable_log_is_accurate_in_the_relative_sense_near_one():
    x = torch.cat([1 + torch.arange(-4096, 4096) * 2.0**-23, torch.logspace(-37, 37, 10_000)])
    exact = x.double().log()
    error = (portable_log(x).double() - exact).abs() / exact.abs().clamp(min=1e-30)
    assert error[exact != 0].max() < 3e-7
    assert portable_log(torch.ones(1)) == 0


def test_normal_noise_is_normal():
    keys = (torch.tensor(x) for x in (3, 4, 5, 0))
    x = normal_noise(torch.arange(1_000_000), *keys).double().numpy()
    assert stats.kstest(x, "norm").pvalue > 1e-4
    for level in (3.0, 4.0):
        assert stats.binomtest(int((x > level).sum()), x.size, stats.norm.sf(level)).pvalue > 1e-4
        assert stats.binomtest(int((x < -level).sum()), x.size, stats.norm.sf(level)).pvalue > 1e-4


@pytest.mark.parametrize("shape", [0.02, 0.7, 1.0, 6.0, 300.0])
def test_gamma_noise_is_gamma(shape):
    keys = (torch.tensor(x) for x in (3, 4, 5, 0))
    ids = torch.arange(200_000)
    x = log_gamma_noise(ids, torch.full((200_000,), shape), *keys).double().exp().numpy()
    assert stats.kstest(x, stats.gamma(shape).cdf).pvalue > 1e-4
