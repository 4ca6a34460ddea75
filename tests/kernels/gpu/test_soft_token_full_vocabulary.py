"""Discrete rows whose set is larger than the slots: the token alone is recorded."""

import math

import pytest
import torch
import triton
import triton.language as tl
from gpu_cases import compare
from logit_styles import logits_of
from triton.runtime.interpreter import GridExecutor

from softgrpo_kernels import gumbel_noise, soft_token
from softgrpo_kernels.gpu.soft_token import cut
from softgrpo_kernels.gpu.soft_token.vocabulary_row import mass_of, unit_of

LIMITS = [
    {}, {"top_p": 0.8317}, {"top_k": 50, "top_p": 0.913}, {"min_p": 0.05}, {"top_k": 10**6},
]  # fmt: skip


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("style", ["plain", "integers", "masked", "equal", "signed zeros"])
def test_the_token_is_the_reference_s(device, style, limits):
    logits = logits_of(style, 3, 700)
    out = compare(
        device, logits, torch.randn(700, 9), k_max=4, mode=1, temperature=0.9,
        uid=torch.arange(3), **limits,
    )  # fmt: skip
    assert (out.n == 1).all()


def test_joint_top_p_over_more_than_the_slots(device):
    logits = logits_of("plain", 3, 500)
    compare(
        device, logits, torch.randn(500, 9), k_max=4, mode=1, top_k=40, top_p=0.5, order="joint",
        position=torch.arange(3),
    )  # fmt: skip


def test_bad_and_other_rows_are_left_alone(device):
    logits = logits_of("plain", 4, 500)
    logits[1, 3] = torch.nan
    mode, top_k = torch.tensor([1, 1, 2, 0]), torch.tensor([-1, -1, 3, 0])
    compare(device, logits, torch.randn(500, 9), k_max=4, mode=mode, top_k=top_k)


@pytest.mark.parametrize("limits", [{}, {"top_p": 0.5}, {"top_k": 2}, {"top_k": 40}], ids=str)
def test_a_temperature_at_which_logits_overflow(device, limits):
    """Nothing is drawn: it was an id past the vocabulary."""
    logits = logits_of("plain", 3, 500)
    logits[1:] += torch.tensor([[100.0], [-100.0]])
    temperature = torch.tensor([1.0, 1e-37, 1e-37])
    out = compare(
        device, logits, torch.randn(500, 9), k_max=4, mode=1, temperature=temperature, **limits
    )
    on_cpu = soft_token(logits, k_max=4, mode=1, temperature=temperature, **limits)
    assert out.valid.tolist() == on_cpu.valid.tolist() == [True, False, False]


@pytest.mark.skipif(torch.cuda.is_available(), reason="seen in the interpreter")
def test_the_last_launch_is_of_few_kinds(device, monkeypatch):
    """As many warps whatever the other rows draw from: they decide in which order sums are added,
    and so the bits of a row. And no kernel of its own for every number of terminal ids."""
    seen, launch = [], GridExecutor.__call__

    def spy(self, *arguments, **settings):
        if self.fn.__name__ == "sample_kernel":
            seen.append((settings["num_warps"], settings["TERMINALS"]))
        return launch(self, *arguments, **settings)

    monkeypatch.setattr(GridExecutor, "__call__", spy)
    for top_k, ends in ((4, 0), (torch.tensor([4]), 3), (4, 4)):
        ids = torch.arange(ends)[None] if ends else None
        soft_token(
            torch.randn(1, 40), top_k=top_k, k_max=4, mode=1, terminal_ids=ids, backend="triton"
        )
    assert seen == [(8, 0), (8, 4), (8, 4)]


def test_a_nucleus_that_overflows_the_list(device):
    """A flat row of which most is kept: the cut is found in the row itself."""
    logits = 0.01 * torch.randn(1, 9000)
    compare(device, logits, torch.randn(9000, 4), k_max=4, mode=1, top_p=0.97)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counted in the interpreter")
@pytest.mark.parametrize("style", ["plain", "integers"])
def test_the_nucleus_is_found_in_one_bin(device, monkeypatch, style):
    """Few passes over the list: a bisection of all 32 bits took some 30."""
    passes, mass_above = [], cut.mass_above

    def counted(*arguments):
        passes.append(arguments)
        return mass_above(*arguments)

    monkeypatch.setattr(cut, "mass_above", counted)
    logits = logits_of(style, 2, 700, torch.bfloat16)
    compare(device, logits, torch.randn(700, 4), k_max=4, mode=1, top_p=0.83, uid=torch.arange(2))
    assert 2 * 2 <= len(passes) <= 2 * 9


def test_draws_follow_the_nucleus(device):
    """Every token of the nucleus and no other, over many positions."""
    p = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    logits = p.log().expand(12, 5).to(device)
    out = soft_token(
        logits, mode=1, top_p=0.6, k_max=1, position=torch.arange(12, device=device),
        backend="triton",
    )  # fmt: skip
    assert set(out.token.tolist()) == {0, 1}


@triton.jit
def mass_kernel(out, a, total, count, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    unit = unit_of(tl.load(total))
    mass = mass_of(tl.load(a + i), 0.0, unit) * tl.load(count + i)
    tl.store(out, tl.sum(mass, axis=0).to(tl.float64) / unit.to(tl.float64))


@pytest.mark.parametrize("vocabulary", [1, 2**18, 2**19 + 2**14, 2**20, 2**30])
def test_masses_of_any_vocabulary_fit(device, vocabulary):
    """A flat row, where the sum is largest, and one with half of its mass in tiny tokens."""
    for a in ([0.0, 0.0], [0.0, -math.log(vocabulary)]):
        a = torch.tensor(a, device=device)
        count = torch.tensor([1, vocabulary - 1], device=device)
        exact = (a.double().exp() * count).sum()
        out = torch.empty(1, dtype=torch.float64, device=device)
        mass_kernel[(1,)](out, a, exact[None], count, BLOCK=2)
        torch.testing.assert_close(out[0], exact, rtol=1e-6, atol=0)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="a minute under the interpreter; its sums are above"
)
def test_a_vocabulary_whose_masses_did_not_fit(device):
    """540,672 equal logits: 2^44 each overflowed an int64."""
    vocabulary = 132 * 4096
    logits = torch.zeros(1, vocabulary, dtype=torch.float16, device=device)
    out = soft_token(logits, mode=1, top_p=0.5, k_max=4, backend="triton")
    kept = vocabulary // 2  # the first of the tied
    noise = gumbel_noise(torch.arange(kept), 0, 0, 0)
    assert out.token.item() == noise.argmax().item()
    assert out.token_logp.item() == pytest.approx(-math.log(kept), abs=1e-5)
