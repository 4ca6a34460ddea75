"""benchmarks/learning/coupled.py: pairs that differ in the weights of the others only."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from softgrpo import Config
from softgrpo_kernels import gumbel_noise, soft_density

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "learning" / "coupled.py"
SPEC = importlib.util.spec_from_file_location("coupled", SCRIPT)
coupled = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(coupled)

N = 100_000
P = torch.tensor([0.55, 0.25, 0.15, 0.05], dtype=torch.float64)


def draw_pair(scale):
    """Two samples of N pairs: ids and g' [N, 4] each, best first in the pair's own draw."""
    ids, row = torch.arange(4).expand(N, 4), torch.arange(N)
    gprime = P.log() + scale * gumbel_noise(ids, 1, row, 0, 2)
    gprime, order = gprime.sort(-1, descending=True)
    logq = P.log()[order]
    pair = []
    for uid in (1, 2):
        rest = torch.exp(-gumbel_noise(order, 1, row, uid, 3).double())
        pair.append(coupled.with_own_rest(gprime, logq, rest, scale))
    return order, *pair


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_each_sample_alone_has_the_law_of_an_ordinary_one(scale):
    order, *pair = draw_pair(scale)
    for gprime in pair:
        # Noise of each candidate: the distribution function of a standard Gumbel number, uniform.
        by_id = torch.empty_like(gprime).scatter_(1, order, gprime)
        uniform = torch.exp(-torch.exp(-(by_id - P.log()) / scale))
        for values in uniform.T.sort().values:
            grid = (torch.arange(N, dtype=torch.float64) + 0.5) / N
            assert (values - grid).abs().max() < 1.95 / math.sqrt(N)  # Kolmogorov: 1 in 1,000
        # Independent of each other.
        correlation = torch.corrcoef(torch.special.ndtri(uniform).T)
        assert (correlation - torch.eye(4)).abs().max() < 4 / math.sqrt(N)
        # The law as a whole: the score of the exact density has mean 0 and variance 1.
        logq = P.log()[order].requires_grad_()
        soft_density(logq, gprime, noise_scale=scale).sum().backward()
        score = scale * torch.empty_like(gprime).scatter_(1, order, logq.grad)
        assert score.mean(0).abs().max() < 4 / math.sqrt(N)
        assert (score.square().mean(0) - 1).abs().max() < 12 / math.sqrt(N)


def test_a_pair_shares_the_token_and_its_clock_and_nothing_else():
    order, one, other = draw_pair(1.0)
    assert torch.equal(one[:, 0], other[:, 0])
    assert (one[:, 1:] < one[:, :1]).all()
    shares = order[:, 0].bincount(minlength=4) / N
    torch.testing.assert_close(shares.double(), P, atol=6e-3, rtol=0)
    clocks = torch.exp(-torch.stack([one, other]))
    rest = ((clocks - clocks[..., :1]) * P[order])[..., 1]
    assert torch.corrcoef(rest)[0, 1].abs() < 4 / math.sqrt(N)


CONFIG = ["rollout.soft.tau=1.0", "algorithm.objective=exact"]


def test_pairs_of_a_model(tiny_config):
    config = Config.load(tiny_config, CONFIG)
    row = coupled.measure(config, pairs=4, prompts=3, seed=0)
    assert row["pairs"] == 12
    assert 0 < row["texts"] <= 1
    assert 0 < row["rewards"] <= row["texts"]
    # Where all weight is on the token, softness decides nothing.
    floored = Config.load(tiny_config, [*CONFIG, "rollout.soft.weight_floor=1"])
    one_hot = coupled.measure(floored, pairs=4, prompts=3, seed=0)
    assert (one_hot["texts"], one_hot["rewards"]) == (0.0, 0.0)
    clipped = Config.load(tiny_config, ["algorithm.objective=official"])
    with pytest.raises(ValueError, match="pairs need unclipped Gumbel noise"):
        coupled.measure(clipped, pairs=1, prompts=1, seed=0)
