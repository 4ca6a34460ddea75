"""The device functions of the other kinds of noise: the bits of the plain ones and of the golden
file."""

import json
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from softgrpo_kernels.gpu.noise import NoiseKey, log_gamma, normal
from softgrpo_kernels.noise import log_gamma_noise, normal_noise

GOLDEN = json.loads((Path(__file__).parents[1] / "golden_noise.json").read_text())
KEYS = ("seed", "position", "uid", "stream")


@triton.jit
def draw_kernel(out, ids, shapes, seed, position, uid, stream, KIND: tl.constexpr):
    i = tl.arange(0, 8)
    key = NoiseKey(tl.load(seed), tl.load(position), tl.load(uid), tl.load(stream))
    token = tl.load(ids + i)
    shape = tl.load(shapes + i)
    value = normal(token, key) if KIND == "normal" else log_gamma(token, shape, key)
    tl.store(out + i, value)


def draw(kind, ids, shapes, keys):
    out = torch.empty(8, device=ids.device)
    keys = [torch.tensor([key], device=ids.device) for key in keys]
    draw_kernel[(1,)](out, ids, shapes, *keys, KIND=kind, enable_fp_fusion=False)
    return out


@pytest.mark.parametrize("row", GOLDEN["rows"])
def test_golden_bits_of_the_other_kinds(device, row):
    ids, shapes = torch.zeros(8, dtype=torch.int32), torch.ones(8)
    ids[:6], shapes[:6] = torch.tensor(GOLDEN["ids"]), torch.tensor(GOLDEN["gamma_shapes"])
    keys = [row[name] for name in KEYS]
    for kind in ("normal", "log_gamma"):
        expected = torch.tensor([float.fromhex(x) for x in row[kind]])
        assert torch.equal(draw(kind, ids.to(device), shapes.to(device), keys)[:6].cpu(), expected)


def test_other_kinds_have_the_bits_of_the_reference(device):
    for position in range(20):
        ids = torch.randint(0, 300_000, (8,), dtype=torch.int32)
        shapes = torch.randn(8).mul(2).exp()
        keys = (2**40 + 3, position, 12, 1)
        tensors = [torch.tensor(key) for key in keys]
        on_device = (ids.to(device), shapes.to(device))
        assert torch.equal(draw("normal", *on_device, keys).cpu(), normal_noise(ids, *tensors))
        assert torch.equal(
            draw("log_gamma", *on_device, keys).cpu(), log_gamma_noise(ids, shapes, *tensors)
        )
