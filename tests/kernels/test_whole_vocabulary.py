"""Draws from the whole vocabulary: what is skipped on the way to them must not have won."""

import pytest
import torch

from softgrpo_kernels import gumbel_noise, soft_token
from softgrpo_kernels.extension import cpu_extension

pytestmark = pytest.mark.skipif(cpu_extension() is None, reason="no C++ extension")
ROWS, VOCABULARY, DISCRETE = 40, 9001, 1


def logits(spread):
    """Normal ones, at spread 0 all equal; with -inf in places, a whole tile among them."""
    generator = torch.Generator().manual_seed(0)
    z_BV = spread * torch.randn(ROWS, VOCABULARY, generator=generator)
    z_BV[:, 512:768] = -torch.inf
    z_BV[:, ::7] = -torch.inf
    return z_BV


# Spread over temperature decides how many tokens can win, and how far below the best the nucleus
# reaches: 0 all are equal, 0.3 all are in the first attempt, 3 several, 40 nobody but the best.
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 40.0])
@pytest.mark.parametrize("isa", [0, 1, 2])
def test_draws_are_those_of_the_reference(isa, spread):
    z = logits(spread)
    row = torch.arange(ROWS)
    settings = {
        "mode": DISCRETE, "top_k": -1, "position": row, "uid": 3, "seed": 11,
        "top_p": torch.tensor([1.0, 0.95, 0.5, 0.999, 1.0, 0.9, 1e-6, 1.0])[row % 8],
        "min_p": torch.tensor([0.0, 0.0, 0.0, 0.0, 0.02, 0.1, 0.0, 0.9])[row % 8],
        "temperature": torch.tensor([1.0, 1.0, 0.3, 2.5, 1.0])[row % 5],
    }  # fmt: skip
    expected = soft_token(z, **settings, backend="reference")
    cpu_extension().limit_isa(isa)
    try:
        out = soft_token(z, **settings, backend="cpu")
    finally:
        cpu_extension().limit_isa(2)
    assert torch.equal(out.token, expected.token)
    torch.testing.assert_close(out.gprime, expected.gprime, rtol=1e-6, atol=5e-6)
    torch.testing.assert_close(out.token_logp, expected.token_logp, rtol=1e-6, atol=5e-6)


def test_the_winner_of_all_has_the_largest_noise_where_logits_are_equal():
    """Of thousands of rows, so that the rare tokens that survive the first bits decide."""
    z = torch.zeros(1, 3000).expand(2000, 3000)
    position = torch.arange(2000)
    token = soft_token(z, mode=DISCRETE, top_k=-1, position=position, seed=5, backend="cpu").token
    ids = torch.arange(3000).expand(100, 3000)
    noise = gumbel_noise(ids, 5, position[:100], torch.zeros(100, dtype=torch.int64))
    assert torch.equal(token[:100].long(), noise.argmax(-1))
    assert len(token.unique()) > 1000
