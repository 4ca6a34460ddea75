"""The best candidate is an exact sample of the distribution it was drawn from."""

import pytest
import torch
from scipy import stats

from softgrpo_kernels import soft_token
from softgrpo_kernels.extension import cpu_extension

needs_extension = pytest.mark.skipif(cpu_extension() is None, reason="no C++ extension")
DISCRETE, SOFT = 1, 2


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def chi_square(counts, p):
    return stats.chisquare(counts, p / p.sum() * counts.sum()).pvalue


P = torch.tensor([0.5, 0.3, 0.12, 0.06, 0.02], dtype=torch.double)


def draw_many(p, draws, **settings):
    z = p.log().float().expand(draws, len(p))
    return soft_token(z, position=torch.arange(draws), seed=5, **settings).token.bincount(
        minlength=len(p)
    )


@pytest.mark.parametrize("mode", [DISCRETE, SOFT])
def test_the_best_candidate_is_an_exact_sample(mode):
    assert chi_square(draw_many(P, 1_000_000, top_k=5, k_max=5, mode=mode), P) > 1e-4


def test_the_clamped_noise_of_the_released_code_fails_the_same_test():
    counts = draw_many(P, 1_000_000, top_k=5, k_max=5, noise_clamp=(-1.5, 3.0))
    assert chi_square(counts, P) < 1e-100


@needs_extension
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_whole_vocabulary_is_an_exact_sample(top_p):
    p = torch.softmax(1.5 * torch.randn(60, dtype=torch.double), -1)
    kept = p.clone()
    if top_p < 1:
        order = p.argsort(descending=True)
        kept[order[p[order].cumsum(0) - p[order] >= top_p]] = 0
    counts = draw_many(p, 200_000, mode=DISCRETE, top_p=top_p, k_max=1)
    assert not counts[kept == 0].any()
    assert chi_square(counts[kept > 0], kept[kept > 0]) > 1e-4
