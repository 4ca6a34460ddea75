"""Parameters that no row may have, and some at the edge that one may; the rest is that of a soft
row with k_max 8."""

import torch

from softgrpo_kernels.methods import (
    DIRICHLET,
    GAUSSIAN,
    MEAN,
    MIXTURE_OF_INPUTS,
    MULTIPLEX,
    MULTIPLEX_WEIGHTED,
    NONE,
)
from softgrpo_kernels.row_rules import DISCRETE, GREEDY

NAN, INF = torch.nan, torch.inf

BAD = [
    {"top_k": -1}, {"top_k": 0}, {"top_k": 9},
    {"mode": 4}, {"mode": -1},
    *({"temperature": x} for x in (0.0, -1.0, 1e-38, NAN, INF)),
    {"temperature": 0.0, "mode": DISCRETE}, {"temperature": NAN, "mode": DISCRETE, "top_k": -1},
    *({"gumbel_tau": x} for x in (0.0, 1e-38, NAN, INF)),
    *({"weight_floor": x} for x in (NAN, -0.1, 1.1)),
    *({"top_p": x} for x in (NAN, INF, -0.1)),
    *({"min_p": x} for x in (NAN, -0.1, 1.1)),
    *({"noise_scale": x} for x in (NAN, INF, -1.0)),
    *({"noise_clamp": x} for x in ((1.0, -1.0), (NAN, 1.0), (0.0, NAN), (INF, INF), (-INF, -INF))),
    *({"eps": x} for x in (NAN, INF, -1e-6)),
    *({name: x} for name in ("position", "uid", "stream") for x in (-1, 2**32)),
    {"uid": -1, "mode": GREEDY},
    {"noise": 8}, {"noise": -1}, {"stream": 2**16, "noise": GAUSSIAN},
    {"noise": DIRICHLET, "noise_scale": 0.0},
    *({"noise": MULTIPLEX, "noise_scale": x} for x in (0.0, 2.5, 65.0)),
    {"noise": MULTIPLEX_WEIGHTED, "noise_scale": 1.5},
    *({"weight_floor": 0.1, "noise": x} for x in (MULTIPLEX, MIXTURE_OF_INPUTS, MEAN)),
]  # fmt: skip

GOOD = [
    {"top_k": 8}, {"top_k": -1, "mode": DISCRETE}, {"temperature": 2.0**-126, "min_p": 1.0},
    {"temperature": 0.0, "gumbel_tau": 0.0, "top_k": 0, "mode": GREEDY},
    {"noise_scale": NAN, "eps": NAN, "gumbel_tau": 0.0, "mode": DISCRETE},
    {"weight_floor": 0.0}, {"weight_floor": 1.0},
    {"top_p": 0.0}, {"top_p": 7.0}, {"noise_scale": 0.0}, {"noise_clamp": (0.5, 0.5)},
    {"uid": 2**32 - 1, "stream": 2**32 - 1, "seed": -(2**63)},
    {"noise": NONE}, {"noise": MULTIPLEX, "noise_scale": 3.0, "stream": 2**16 - 1},
    {"noise": MULTIPLEX_WEIGHTED, "noise_scale": 64.0}, {"noise": GAUSSIAN, "weight_floor": 0.1},
    {"noise": MIXTURE_OF_INPUTS, "noise_scale": 0.0}, {"noise": MEAN, "noise_scale": 2.5},
]  # fmt: skip
