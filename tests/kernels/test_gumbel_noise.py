"""The op gumbel_noise: its bits on every back end, its distribution, what it depends on."""

import json
import math
from pathlib import Path

import pytest
import torch
from scipy import stats

from softgrpo_kernels import gumbel_noise
from softgrpo_kernels import noise as plain
from softgrpo_kernels.extension import cpu_extension

GOLDEN = json.loads((Path(__file__).parent / "golden_noise.json").read_text())
IDS = torch.tensor(GOLDEN["ids"], dtype=torch.int32)


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


@pytest.mark.parametrize("row", GOLDEN["rows"])
def test_golden_bits(noise, row):
    keys = [row[name] for name in ("seed", "position", "uid", "stream")]
    golden = torch.tensor([float.fromhex(x) for x in row["gumbel"]])
    assert torch.equal(noise(IDS, *keys), golden)


def test_all_back_ends_give_the_same_bits(noise):
    ids = torch.randint(-3, 300_000, (50, 1003), dtype=torch.int32)
    keys = torch.randint(0, 2**32, (4, 50))
    keys[0] -= 2**31
    expected = plain.gumbel_noise(ids, *keys)
    assert torch.equal(noise(ids, *keys), expected)
    assert torch.equal(expected == 0, ids < 0)


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
