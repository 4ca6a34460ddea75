"""Soft-thinking methods, each in a file of its own: draw, weights, record, density.

A new one is a subclass of `Method` in a new file and an entry of METHODS. One that draws as another
does needs no more; a draw of its own has a number of its own, and a case in C++
(csrc/soft_token_perturb.cpp) and Triton, without which those back ends do not know it.
"""

from __future__ import annotations

from softgrpo_kernels.methods.argmax import Argmax
from softgrpo_kernels.methods.censored import Censored
from softgrpo_kernels.methods.concrete import Concrete
from softgrpo_kernels.methods.dirichlet import Dirichlet
from softgrpo_kernels.methods.embedding import EmbeddingNoise
from softgrpo_kernels.methods.gaussian import Gaussian
from softgrpo_kernels.methods.gumbel import Gumbel
from softgrpo_kernels.methods.latent_grpo import LatentGrpo
from softgrpo_kernels.methods.lepo import Lepo
from softgrpo_kernels.methods.mean import Mean
from softgrpo_kernels.methods.method import Method
from softgrpo_kernels.methods.mixture_of_inputs import MixtureOfInputs
from softgrpo_kernels.methods.multiplex import Multiplex, PerSlot, SlotMean
from softgrpo_kernels.methods.multiplex_weighted import (
    MultiplexWeighted,
    WeightedPerSlot,
    WeightedSlotMean,
)
from softgrpo_kernels.methods.official import Official
from softgrpo_kernels.methods.plain import Plain

# Of methods with one noise the first is the one that stands for it where no density is asked for.
METHODS: tuple[Method, ...] = (
    Gumbel(), Official(), Concrete(), Censored(), Argmax(), LatentGrpo(), Lepo(),
    Plain(), Dirichlet(), Gaussian(),
    Multiplex(), SlotMean(), PerSlot(), MultiplexWeighted(), WeightedSlotMean(), WeightedPerSlot(),
    MixtureOfInputs(), Mean(), EmbeddingNoise(),
)  # fmt: skip
# The methods that draw differently, in the order of their numbers.
DRAWS = tuple(sorted({m.code: m for m in reversed(METHODS)}.values(), key=lambda m: m.code))
NOISES = tuple(method.noise for method in DRAWS)
# All of them, also those that draw as another does and add noise to the mixture.
SOFT_NOISES = (*NOISES, *dict.fromkeys(m.noise for m in METHODS if m.noise not in NOISES))
GUMBEL, NONE, DIRICHLET, GAUSSIAN, *_DRAWN = (method.code for method in DRAWS)
# From MULTIPLEX on they draw the token itself.
MULTIPLEX, MULTIPLEX_WEIGHTED, MIXTURE_OF_INPUTS, MEAN = _DRAWN
OBJECTIVES = tuple(dict.fromkeys(m.objective for m in METHODS if m.objective is not None))


def objectives_of(noise: str) -> list[str]:
    """The densities that a noise has."""
    return [m.objective for m in METHODS if m.noise == noise and m.objective is not None]


def method_of(noise: str, objective: str | None = None) -> Method:
    """The method with this noise and this density; None: whatever its density.

    Raises:
        ValueError: there is none; the message lists the names.
    """
    if noise not in SOFT_NOISES:
        raise ValueError(f"noise must be one of {', '.join(SOFT_NOISES)}, not {noise!r}")
    for method in METHODS:
        if method.noise == noise and objective in (None, method.objective):
            return method
    known = ", ".join(objectives_of(noise))
    raise ValueError(f"objective must be one of {known} with {noise} noise, not {objective!r}")
