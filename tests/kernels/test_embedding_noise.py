"""Gaussian noise on mixtures: its bits and law, and the density of what it was added to."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from softgrpo_kernels import embedding_noise, soft_token
from softgrpo_kernels.embedding_noise import root_mean_square, with_noise
from softgrpo_kernels.extension import cpu_extension
from softgrpo_kernels.methods import method_of
from softgrpo_kernels.methods.method import NoisyMixtures, Rollout
from softgrpo_kernels.noise import normal_noise

METHOD = method_of("embedding")
KEYS = {"seed": 7, "uid": torch.arange(5) * 1000, "stream": 1}
POSITIONS = torch.tensor([3, 0, 2**32 - 1, 3, 90])


@pytest.mark.skipif(cpu_extension() is None, reason="no C++")
@pytest.mark.parametrize("size", [1, 15, 16, 33])  # a lone lane, a tail, whole registers, both
def test_cpp_has_the_bits_of_the_reference(size):
    ours = embedding_noise(size, position=POSITIONS, **KEYS, backend="cpu")
    theirs = embedding_noise(size, position=POSITIONS, **KEYS, backend="reference")
    assert ours.shape == (5, size)
    assert torch.equal(ours, theirs)


def test_a_row_depends_on_its_own_keys_alone():
    together = embedding_noise(24, position=POSITIONS, **KEYS)
    for row in range(5):
        keys = KEYS | {"uid": KEYS["uid"][row : row + 1]}
        alone = embedding_noise(24, position=POSITIONS[row : row + 1], **keys)
        assert torch.equal(alone[0], together[row])
    for change in ({"seed": 8}, {"uid": KEYS["uid"] + 1}, {"stream": 0}):
        assert not (embedding_noise(24, position=POSITIONS, **KEYS | change) == together).any()
    # No draw of a token reads the same words.
    dimensions = torch.arange(24).expand(5, 24)
    keys = [torch.as_tensor(x).expand(5) for x in (7, POSITIONS, KEYS["uid"], 1)]
    assert not (normal_noise(dimensions, *keys) == together).any()


def test_it_is_standard_normal_in_every_direction():
    noise = embedding_noise(8, 1, torch.arange(20_000), 5, 0).double()
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-4
    products = noise.T @ noise / len(noise)
    assert (products - torch.eye(8)).abs().max() < 5 * math.sqrt(2 / len(noise))


def test_the_unit_is_the_root_mean_square_of_the_table():
    table = torch.randn(37, 12)
    expected = table.double().square().mean().sqrt()
    torch.testing.assert_close(root_mean_square(table), expected, rtol=1e-7, atol=0)
    half = table.bfloat16()
    expected = half.double().square().mean().sqrt()
    torch.testing.assert_close(root_mean_square(half), expected, rtol=1e-7, atol=0)


def test_noise_is_added_in_fp32_and_rounded_once():
    mixtures, noise = torch.randn(4, 8).bfloat16(), torch.randn(4, 8)
    deviation = torch.tensor([[0.3], [0.0], [1.0], [2.0]])
    ours = with_noise(mixtures, noise, deviation)
    assert torch.equal(ours, (mixtures.float() + deviation * noise).bfloat16())
    assert torch.equal(ours[1], mixtures[1])


def test_soft_token_says_that_it_does_not_make_this_noise():
    with pytest.raises(ValueError, match=r"noise must be one of gumbel, none, .*'embedding'"):
        soft_token(torch.randn(1, 9), top_k=3, noise="embedding")


def toy(n, dtype=torch.float64):
    """Logits of 4 candidates, their embeddings and the noise of n positions."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.9, 0.2, -0.4, -1.5], dtype=torch.float64)
    table = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    ids = torch.tensor([4, 0, 7, 2]).expand(n, 4)
    noise = embedding_noise(6, 3, torch.arange(n), 11, 0).to(dtype)
    mixtures = NoisyMixtures(ids, noise, torch.tensor(0.4, dtype=dtype), table.to(dtype))
    return logits, mixtures


@pytest.mark.parametrize("tau", [1.0, 0.4])
def test_density_is_that_of_a_normal_vector(tau):
    """Against scipy, up to the density under the rollout's own p."""
    logits, mixtures = toy(30)
    p, q = logits.log_softmax(-1), (logits + torch.tensor([0.3, -0.2, 0.5, 0.1])).log_softmax(-1)
    ours = METHOD.density(q.expand(30, 4), p.expand(30, 4), Rollout(tau=tau, mixtures=mixtures))
    candidates = mixtures.table[mixtures.ids[0]].numpy()
    center_p, center_q = ((x / tau).softmax(-1).numpy() @ candidates for x in (p, q))
    inputs = center_p + 0.4 * mixtures.noise.numpy()
    law = [stats.multivariate_normal(center, 0.4**2 * np.eye(6)) for center in (center_p, center_q)]
    np.testing.assert_allclose(ours.numpy(), law[1].logpdf(inputs) - law[0].logpdf(inputs))
    assert ours.abs().max() > 0.5


def test_gradient_equals_finite_differences():
    logits, mixtures = toy(1)
    p = logits.log_softmax(-1)[None]
    rollout = Rollout(tau=0.7, mixtures=mixtures)
    leaf = (logits + torch.tensor([0.3, -0.2, 0.5, 0.1]))[None].requires_grad_()

    def density(z):
        return METHOD.density(z.log_softmax(-1), p, rollout)

    assert torch.autograd.gradcheck(density, (leaf,), eps=1e-6, atol=1e-7)


def test_score_has_mean_0_its_energy_and_gives_the_gradient_of_an_expectation():
    """On policy: E[s_j^2] = p_j^2 |E_j - h|^2 / sigma^2, and of a linear reward <a, input> the
    gradient p_j <a, E_j - h>."""
    n = 200_000
    logits, mixtures = toy(n)
    leaf = logits.expand(n, 4).clone().requires_grad_()
    logp = logits.log_softmax(-1).expand(n, 4)
    METHOD.density(leaf.log_softmax(-1), logp, Rollout(tau=1.0, mixtures=mixtures)).sum().backward()
    score, p = leaf.grad, logits.softmax(-1)
    candidates = mixtures.table[mixtures.ids[0]]
    center = p @ candidates
    error = score.std(0) / math.sqrt(n)
    assert (score.mean(0).abs() < 4.5 * error).all()
    energy = p.square() * (candidates - center).square().sum(-1) / 0.4**2
    torch.testing.assert_close(score.square().mean(0), energy, rtol=0.03, atol=0)
    direction = torch.tensor([1.0, -0.5, 0.3, 2.0, -1.0, 0.4], dtype=torch.float64)
    reward = 0.4 * mixtures.noise @ direction
    products = reward[:, None] * score
    expected = p * ((candidates - center) @ direction)
    error = products.std(0) / math.sqrt(n)
    assert ((products.mean(0) - expected).abs() < 4.5 * error).all()
    assert (expected.abs() > 10 * error).any()  # the comparison has power


def test_fp32_loses_nothing_to_the_length_of_the_noise():
    """|eps|^2 is about 4096, of which fp32 has 5e-4; a small step of the policy is finer."""
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(50, 4096, generator=generator)
    ids = torch.randint(50, (20, 5), generator=generator)
    p = torch.randn(20, 5, generator=generator).log_softmax(-1)
    q = (p + 1e-4 * torch.randn(20, 5, generator=generator)).log_softmax(-1)
    noise = embedding_noise(4096, 1, torch.arange(20), 0, 0)

    def density(dtype):
        mixtures = NoisyMixtures(
            ids, noise.to(dtype), torch.tensor(0.33, dtype=dtype), table.to(dtype)
        )
        return METHOD.density(q.to(dtype), p.to(dtype), Rollout(tau=1.0, mixtures=mixtures))

    exact = density(torch.float64)
    torch.testing.assert_close(density(torch.float32).double(), exact, atol=5e-5, rtol=1e-2)
    assert exact.abs().median() > 1e-3


def test_dead_slots_and_rows_and_nan():
    logq = torch.tensor([[-0.5, -0.9, 7.0], [1.0, 1.0, 1.0], [-0.5, math.nan, -2.0]])
    gprime = torch.tensor([[-0.4, -1.1, -math.inf], [-math.inf] * 3, [-0.4, -1.1, -3.0]])
    ids = torch.tensor([[1, 2, -1], [-1, -1, -1], [1, 2, 3]])
    logq.requires_grad_()
    mixtures = NoisyMixtures(ids, torch.randn(3, 8), torch.tensor(0.5), torch.randn(4, 8))
    density = METHOD.density(logq, gprime, Rollout(tau=1.0, mixtures=mixtures))
    density[:2].sum().backward()
    assert density[0] != 0
    assert density[1] == 0
    assert density[2].isnan()
    assert (logq.grad[0, :2] != 0).all()
    assert logq.grad[0, 2] == 0
    assert (logq.grad[1] == 0).all()
