"""Every stand-in of a kernel of the engine against that kernel, in the launches of our wrappers."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from simulated_gpu.launches import (
    DTYPES,
    STAND_INS,
    Cases,
    assert_same_arguments,
    launched,
    launches,
    poison,
)
from softgrpo_engine.ops import gpu as ops

sys.path.insert(0, str(Path(__file__).parents[1] / "engine" / "ops"))
from attention_cases import make_case

__all__ = ["launches", "poison"]  # fixtures

# Not the functions that the package has under these names.
attention = importlib.import_module("softgrpo_engine.ops.gpu.paged_attention")
norm = importlib.import_module("softgrpo_engine.ops.gpu.rms_norm")

# numpy's, of the kernels: infinities and NaN are part of the cases.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

KERNELS = launched(ops)
CASES = Cases()
reaches, assert_reached = CASES.reaches, CASES.assert_reached


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_arguments_are_the_kernel_s(name):
    assert_same_arguments(name, KERNELS[name])


def test_every_kernel_has_a_stand_in_and_a_case():
    assert set(KERNELS) <= set(STAND_INS)
    assert set().union(*CASES.reached.values()) == set(KERNELS)


@reaches(
    "rms_norm.rms_norm_kernel", "silu_mul.silu_mul_kernel", "rope_store_kv.rope_store_kv_kernel"
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_activation_and_rope(launches, dtype):
    x, residual, weight = (torch.randn(*shape).to(dtype) for shape in ((3, 48), (3, 48), (48,)))
    ops.rms_norm(x, weight, 1e-5)
    ops.rms_norm(x, weight, 1e-5, residual)
    ops.silu_mul(4 * torch.randn(3, 140).to(dtype))
    ops.silu_mul(torch.randn(1, 4200).to(dtype))  # two blocks
    heads, kv_heads, dim, page = 7, 2, 6, 5  # two blocks of heads
    qkv = torch.randn(4, (heads + 2 * kv_heads) * dim).to(dtype)
    cos, sin = torch.randn(2, 4, dim)
    k_pages, v_pages = torch.full((2, 4, kv_heads, page, dim), 5.0).to(dtype)
    slots = torch.tensor([17, 0, 9, 5])
    ops.rope_store_kv(qkv, cos, sin, k_pages, v_pages, slots, heads, kv_heads)
    assert_reached(test_norm_activation_and_rope, launches)


@reaches(
    "rms_norm.rms_norm_kernel", "rms_norm.rms_norm_backward_kernel",
    "silu_mul.silu_mul_backward_kernel", "rotate_heads.rotate_heads_kernel",
    "rotate_heads.rotate_heads_backward_kernel",
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_in_training(launches, monkeypatch, dtype):
    """More rows than programs; master weights; gate and up in one tensor and in two; two blocks of
    heads, a prompt's tokens with three copies."""
    monkeypatch.setattr(norm, "PROGRAMS", 2)
    total, grad, other = torch.randn(3, 5, 48).to(dtype)
    weight = torch.randn(48)
    ops.rms_norm(total, weight, 1e-5)
    ops.rms_norm_backward(grad, other, total, weight, 1e-5, need_weight=True)
    ops.rms_norm_backward(grad, None, total, weight.to(dtype), 1e-5, need_weight=False)
    gate, up, grad = (4 * torch.randn(3, 3, 1100)).to(dtype)
    ops.silu_mul_backward(grad, gate, up)
    ops.silu_mul_backward(grad, torch.cat((gate, up), dim=1))
    heads, kv_heads, dim = 7, 2, 6
    qkv = torch.randn(4, (heads + 2 * kv_heads) * dim).to(dtype)
    cos, sin = torch.randn(2, 4, dim)
    starts, copies = torch.tensor([0, 3, 4, 4, 6]).int(), torch.tensor([5, 0, 2, 1, 3, 4]).int()
    q, k, v = ops.rotate_heads(qkv, cos, sin, starts, copies, heads, kv_heads)
    grads = (torch.randn_like(x) for x in (q, k, v))
    ops.rotate_heads_backward(*grads, cos, sin, starts, copies)
    assert_reached(test_layers_in_training, launches)


@reaches("paged_attention.decode_kernel", "paged_attention.join_kernel")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", [128, 512])
def test_decode_attention(launches, monkeypatch, dtype, split):
    """Groups of 3; with a split of 128 up to three of them, and rows with one."""
    monkeypatch.setattr(attention, "SPLIT", split)
    args, kwargs = make_case([300, 128, 1, 129], [1] * 4, (6, 2), 24, 16, dtype)
    args[4][2] = 0 if split == 512 else 1  # a row that nobody reads
    ops.paged_attention(*args, scale=kwargs["scale"])
    assert set(launches) <= CASES.reached["test_decode_attention"]
    assert len(launches) == (2 if split == 128 else 1)


@reaches("paged_attention.prefill_kernel")
@pytest.mark.parametrize(("dtype", "heads"), [(DTYPES[0], (6, 2)), (DTYPES[1], (3, 1))])
def test_prefill_attention(launches, dtype, heads):
    """Whole prompts, a prompt behind a prefix, a sequence without queries, decode rows."""
    args, kwargs = make_case([40, 30, 20, 50, 1], [40, 13, 0, 1, 1], heads, 24, 16, dtype)
    ops.paged_attention(*args, **kwargs)
    assert_reached(test_prefill_attention, launches)
