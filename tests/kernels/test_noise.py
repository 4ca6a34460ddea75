"""Noise: the bits, their accuracy, their distribution, what they depend on."""

import math

import pytest
import torch
from scipy import stats

from softgrpo_kernels import gumbel_noise, reference
from softgrpo_kernels.extension import cpu_extension
from softgrpo_kernels.reference.noise import gumbel_from_words, portable_log

IDS = torch.tensor([0, 1, 2, 17, 49151, 151935], dtype=torch.int32)
# (seed, position, uid, stream): noise of IDS. A negative and a 64-bit seed, the largest uid.
GOLDEN = {
    (0, 0, 0, 0): (
        "0x1.5984aap-1 -0x1.46cb14p+0 0x1.f70eaap+1 0x1.395e60p-1 0x1.0b981ap-1 -0x1.5bacacp+0"
    ),
    (-5, 100, 2**32 - 1, 1): (
        "0x1.b339e4p-3 0x1.b23640p+0 0x1.5afeb2p-4 0x1.10733cp+1 -0x1.1dfd0cp+0 0x1.3c9168p+0"
    ),
    (2**40 + 3, 7, 12, 0): (
        "-0x1.316564p-3 0x1.990ef2p-6 -0x1.04ca00p-3 0x1.12622cp+1 0x1.6e94b6p-1 0x1.6e3376p-2"
    ),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "portable", "avx2", "best"])
def noise(request):
    """The op on every back end and instruction set."""
    if request.param == "reference":
        yield lambda ids, *keys: reference.gumbel_noise(ids, *(torch.as_tensor(k) for k in keys))
        return
    if cpu_extension() is None:
        pytest.skip("no C++ extension")
    cpu_extension().limit_isa(["portable", "avx2", "best"].index(request.param))
    yield gumbel_noise
    cpu_extension().limit_isa(2)


def test_philox_known_answer():
    zero = torch.tensor(0)
    words = reference.philox4x32((zero,) * 4, (zero,) * 2)
    assert [int(w) for w in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    # All bits set, from the test vectors of Random123.
    ones = torch.tensor(0xFFFFFFFF)
    words = reference.philox4x32((ones,) * 4, (ones,) * 2)
    assert [int(w) for w in words] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("key", GOLDEN)
def test_golden_bits(noise, key):
    expected = torch.tensor([float.fromhex(x) for x in GOLDEN[key].split()], dtype=torch.float32)
    assert torch.equal(noise(IDS, *key), expected)


def test_all_back_ends_give_the_same_bits(noise):
    ids = torch.randint(-3, 300_000, (50, 1003), dtype=torch.int32)
    keys = torch.randint(0, 2**32, (4, 50))
    keys[0] -= 2**31
    expected = reference.gumbel_noise(ids, *keys)
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
