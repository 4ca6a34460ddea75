"""Discrete rows whose set is larger than the slots: the token alone is recorded."""

import pytest
import torch
from gpu_cases import compare
from logit_styles import logits_of

from softgrpo_kernels import soft_token

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


def test_a_nucleus_that_overflows_the_list(device):
    """A flat row of which most is kept: the cut is found in the row itself."""
    logits = 0.01 * torch.randn(1, 9000)
    compare(device, logits, torch.randn(9000, 4), k_max=4, mode=1, top_p=0.97)


def test_draws_follow_the_nucleus(device):
    """Every token of the nucleus and no other, over many positions."""
    p = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    logits = p.log().expand(12, 5).to(device)
    out = soft_token(
        logits, mode=1, top_p=0.7, k_max=1, position=torch.arange(12, device=device),
        backend="triton",
    )  # fmt: skip
    assert set(out.token.tolist()) == {0, 1}
