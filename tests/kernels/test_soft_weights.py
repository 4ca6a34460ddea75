"""Mixture weights."""

import pytest
import torch

from softgrpo_kernels import soft_weights


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_bad_input_is_named():
    gprime, kind = torch.zeros(2, 3), torch.ones(2, dtype=torch.uint8)
    for tau in (0.0, -1.0, 1e-40, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="tau must be > 0"):
            soft_weights(gprime, kind, tau)
    with pytest.raises(ValueError, match=r"tau must be a number or \[2\], not \[3\]"):
        soft_weights(gprime, kind, torch.ones(3))
    with pytest.raises(ValueError, match="kind"):
        soft_weights(gprime, kind[:1], 1.0)


def test_weights_of_every_kind():
    gprime = torch.tensor([[1.0, 0.5, -torch.inf], [1.0, 0.5, 0.2], [-torch.inf] * 3])
    out = soft_weights(gprime, torch.tensor([1, 0, 1], dtype=torch.uint8), 0.5)
    first = 1 / (1 + torch.exp(torch.tensor(-1.0)))
    expected = torch.tensor([[first, 1 - first, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(out, expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("slot", [0, 1])
def test_a_nan_shows(slot, floor):
    gprime = torch.tensor([[0.0, -0.1, -0.2]])
    gprime[0, slot] = torch.nan
    kind = torch.ones(1, dtype=torch.uint8)
    assert soft_weights(gprime, kind, 0.5, floor).isnan().all()


def test_a_floor_leaves_out_what_is_below_it_and_the_rest_adds_up_to_1():
    tau, floor = 0.5, 0.1
    # Weights 1, 0.5, 0.1 + , 0.1 - , 0.01 of the largest; an unused slot.
    shares = torch.tensor([1.0, 0.5, 0.1001, 0.0999, 0.01])
    gprime = torch.cat([tau * shares.log(), torch.tensor([-torch.inf])])[None]
    kind = torch.ones(1, dtype=torch.uint8)
    out = soft_weights(gprime, kind, tau, floor)
    expected = torch.tensor([[1.0, 0.5, 0.1001, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(out, expected / expected.sum(), rtol=1e-6, atol=0)
    per_row = soft_weights(gprime, kind, torch.tensor([tau]), torch.tensor([floor]))
    assert torch.equal(per_row, out)
    assert torch.equal(soft_weights(gprime, kind, tau, 0.0), soft_weights(gprime, kind, tau))
    assert soft_weights(gprime, kind, tau, 1.0).tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match=r"weight_floor must be in 0 \.\. 1, not 1.5"):
        soft_weights(gprime, kind, tau, 1.5)


def test_weights_do_not_depend_on_the_padding_or_the_batch():
    gprime = torch.randn(1000, 30).sort(descending=True).values
    kind, tau = torch.ones(1000, dtype=torch.uint8), torch.rand(1000) + 0.05
    alone = torch.cat([soft_weights(gprime[i, :5], kind[i], tau[i])[None] for i in range(1000)])
    padded = gprime.clone()
    padded[:, 5:] = -torch.inf
    together = soft_weights(padded, kind, tau)
    assert torch.equal(together[:, :5], alone)
    assert not together[:, 5:].any()


@pytest.mark.parametrize("tau", [0.1, 0.7])
def test_the_weights_of_a_gpu_are_those_of_the_cpu(gpu, tau):
    """To the bit: CUDA divides by a number as it multiplies by the reciprocal, which is not."""
    gprime = torch.randn(200, 8).sort(-1, descending=True).values
    kind = torch.ones(200, dtype=torch.uint8)
    ours = soft_weights(gprime.to(gpu), kind.to(gpu), tau)
    assert torch.equal(ours.cpu(), soft_weights(gprime, kind, tau))
