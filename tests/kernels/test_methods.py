"""What the methods say of themselves: names, numbers, densities."""

import pytest
import torch

from softgrpo_kernels import soft_density
from softgrpo_kernels.methods import (
    DRAWS,
    METHODS,
    MULTIPLEX,
    NOISES,
    OBJECTIVES,
    SOFT_NOISES,
    method_of,
    objectives_of,
)
from softgrpo_kernels.methods.method import NoisyMixtures, Rollout


def test_every_noise_has_the_number_of_its_place():
    assert [method.code for method in DRAWS] == list(range(len(DRAWS)))
    assert NOISES == (
        "gumbel", "none", "dirichlet", "gaussian",
        "multiplex", "multiplex_weighted", "mixture_of_inputs", "mean",
    )  # fmt: skip  # C++ and Triton
    assert (*NOISES, "embedding") == SOFT_NOISES  # drawn as none
    assert method_of("embedding").code == method_of("none").code
    assert OBJECTIVES == (
        "exact", "official", "concrete", "censored", "argmax", "latent_grpo", "lepo",
        "slot_mean", "per_slot", "token",
    )  # fmt: skip


def test_those_that_draw_the_token_have_the_last_numbers():
    """C++ and Triton tell them by `>= MULTIPLEX`."""
    assert [method.draws_token for method in DRAWS] == [
        code >= MULTIPLEX for code in range(len(DRAWS))
    ]


def test_noise_and_objective_name_one_method():
    names = [(method.noise, method.objective) for method in METHODS]
    assert sorted(set(names), key=str) == sorted(names, key=str)
    for method in METHODS:
        assert method_of(method.noise, method.objective) is method
    assert method_of("gumbel") is METHODS[0]
    assert objectives_of("dirichlet") == ["exact"]
    assert objectives_of("none") == []


def test_a_method_that_does_not_exist_is_named_with_those_that_do():
    with pytest.raises(ValueError, match=r"noise must be one of gumbel, .*, not 'uniform'"):
        method_of("uniform")
    with pytest.raises(ValueError, match=r"exact, official, .*lepo with gumbel .* 'official2'"):
        method_of("gumbel", "official2")
    with pytest.raises(ValueError, match=r"one of exact with dirichlet noise, not 'concrete'"):
        method_of("dirichlet", "concrete")


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.noise}-{m.objective}")
def test_a_method_has_a_density_or_says_why_not(method):
    logq = torch.randn(4, 3).log_softmax(-1)
    gprime = logq.clone().sort(descending=True).values
    gprime[0, 2] = -torch.inf
    if method.objective is None:
        assert method.why_untrained
        with pytest.raises(NotImplementedError):
            method.density(logq, gprime, Rollout())
    else:
        assert not method.why_untrained
        ids = torch.arange(3).expand(4, 3)
        mixtures = NoisyMixtures(ids, torch.randn(4, 5), torch.tensor(0.3), torch.randn(3, 5))
        rollout = Rollout(mixtures=mixtures if method.adds_noise else None)
        assert method.density(logq, gprime, rollout).isfinite().all()


@pytest.mark.parametrize("objective", objectives_of("gumbel"))
def test_the_public_density_is_the_method_s(objective):
    logq = torch.randn(4, 3).log_softmax(-1)
    ours = soft_density(
        logq, logq + 0.3, objective=objective, noise_scale=0.7, tau=0.2, weight_floor=0.1
    )
    assert torch.equal(
        ours, method_of("gumbel", objective).density(logq, logq + 0.3, Rollout(0.7, 0.2, 0.1))
    )
