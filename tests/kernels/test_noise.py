"""Noise: the bits, their accuracy, their distribution, what they depend on."""

import json
import math
from pathlib import Path

import pytest
import torch
from scipy import stats

from softgrpo_kernels import gumbel_noise
from softgrpo_kernels import noise as plain
from softgrpo_kernels.extension import cpu_extension
from softgrpo_kernels.noise import (
    gumbel_from_words,
    log_gamma_noise,
    normal_noise,
    portable_log,
)

GOLDEN = json.loads((Path(__file__).parent / "golden_noise.json").read_text())
IDS = torch.tensor(GOLDEN["ids"], dtype=torch.int32)
SHAPES = torch.tensor(GOLDEN["gamma_shapes"])
KEY_NAMES = ("seed", "position", "uid", "stream")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "portable", "avx2", "best"])
def noise(request):
    """The op on every back end and instruction set."""
    if request.param == "reference":
        yield lambda ids, *keys: plain.gumbel_noise(ids, *(torch.as_tensor(k) for k in keys))
        return
    if cpu_extension() is None:
        pytest.skip("no C++ extension")
    cpu_extension().limit_isa(["portable", "avx2", "best"].index(request.param))
    yield gumbel_noise
    cpu_extension().limit_isa(2)


def test_philox_known_answer():
    zero = torch.tensor(0)
    words = plain.philox4x32((zero,) * 4, (zero,) * 2)
    assert [int(w) for w in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    # All bits set, from the test vectors of Random123.
    ones = torch.tensor(0xFFFFFFFF)
    words = plain.philox4x32((ones,) * 4, (ones,) * 2)
    assert [int(w) for w in words] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def bits(values):
    return torch.tensor([float.fromhex(x) for x in values], dtype=torch.float32)


@pytest.mark.parametrize("row", GOLDEN["rows"])
def test_golden_bits(noise, row):
    assert torch.equal(noise(IDS, *(row[name] for name in KEY_NAMES)), bits(row["gumbel"]))


@pytest.mark.parametrize("row", GOLDEN["rows"])
def test_golden_bits_of_the_other_kinds(row):
    keys = [torch.tensor(row[name]) for name in KEY_NAMES]
    assert torch.equal(plain.gumbel_noise(IDS, *keys, 3), bits(row["gumbel_of_draw_3"]))
    assert torch.equal(normal_noise(IDS, *keys), bits(row["normal"]))
    assert torch.equal(log_gamma_noise(IDS, SHAPES, *keys), bits(row["log_gamma"]))


def test_all_back_ends_give_the_same_bits(noise):
    ids = torch.randint(-3, 300_000, (50, 1003), dtype=torch.int32)
    keys = torch.randint(0, 2**32, (4, 50))
    keys[0] -= 2**31
    expected = plain.gumbel_noise(ids, *keys)
    assert torch.equal(noise(ids, *keys), expected)
    assert torch.equal(expected == 0, ids < 0)


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


def test_distribution_is_gumbel():
    g = gumbel_noise(torch.arange(2_000_000).view(2, -1), 11, 3, torch.tensor([4, 5])).flatten()
    assert stats.kstest(g.double().numpy(), "gumbel_r").pvalue > 1e-4
    for level in (5.0, 8.0, 10.0):
        tail = -math.expm1(-math.exp(-level))
        count = int((g > level).sum())
        assert stats.binomtest(count, g.numel(), tail).pvalue > 1e-4
    two = g.view(2, -1)
    assert abs(torch.corrcoef(two)[0, 1]) < 4 / math.sqrt(two.shape[1])


def test_every_word_of_the_key_counts():
    base = {"seed": 1, "position": 2, "uid": 3, "stream": 0}
    changed = [{**base, name: base[name] + 1} for name in base]
    changed += [{**base, "seed": 1 + 2**32}, base | {"position": 3, "uid": 2}]
    draws = [gumbel_noise(IDS, **keys) for keys in [base, *changed]]
    for i, a in enumerate(draws):
        assert all(not bool((a == b).any()) for b in draws[i + 1 :])


def test_keys_broadcast_against_rows():
    ids = torch.randint(0, 1000, (3, 4, 5))
    uid = torch.arange(4)
    g = gumbel_noise(ids, 9, torch.tensor(6), uid)
    assert g.shape == ids.shape
    assert torch.equal(g[1, 2], gumbel_noise(ids[1, 2], 9, 6, 2))


@pytest.mark.parametrize(("name", "value"), [("uid", 2**32), ("uid", -1), ("position", 2**32)])
def test_words_outside_32_bits_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        gumbel_noise(IDS, **{"seed": 0, "position": 0, "uid": 0, name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"uid": -1}, "uid must be in 0 .. 2"),
        ({"stream": 2**32}, "stream must be in 0 .. 2"),
        ({"seed": 2**64}, "seed must fit into a signed word"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"position": torch.ones(1)}, "position must hold integers"),
        ({"uid": torch.arange(3)}, r"uid must broadcast to \[2\], not \[3\]"),
    ],
)
def test_bad_keys_are_named_on_any_device(change, message):
    for device in ("cpu", "meta"):  # meta: nobody could look at a tensor
        ids = torch.zeros(2, 4, dtype=torch.int32, device=device)
        with pytest.raises(ValueError, match=message):
            gumbel_noise(ids, **{"seed": 0, "position": 0, "uid": 0} | change)


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
