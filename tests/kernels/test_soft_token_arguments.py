"""What soft_token refuses, by name and on every device, before any work."""

import pytest
import torch
from row_cases import BAD

from softgrpo_kernels import soft_token
from softgrpo_kernels.methods import NOISES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 0}, "soft row needs 1 <= top_k <= k_max = 32, not top_k = 0"),
        ({"top_k": 65}, "not top_k = 65"),
        ({"top_k": torch.tensor([5, -1])}, "not top_k = -1"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"temperature": torch.tensor([1.0, torch.nan])}, "temperature must be > 0"),
        ({"gumbel_tau": 0.0}, "gumbel_tau must be > 0"),
        ({"min_p": 1.5}, "min_p"),
        ({"mode": 4}, "mode must be"),
        ({"uid": 2**32}, "uid must be"),
        ({"k_max": 65}, "k_max must be"),
        ({"noise_clamp": torch.zeros(2)}, "noise_clamp"),
        ({"embed": torch.zeros(3, 2)}, "embed must be"),
        ({"hidden": torch.zeros(2, 3)}, "go together"),
        ({"terminal_ids": torch.zeros(3, 1)}, "terminal_ids"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        soft_token(torch.randn(2, 50), **{"top_k": 5, **arguments})


# On "meta" nobody can look at a value: what is refused there is refused before any work.
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_numbers_are_refused_on_every_device(device, bad):
    name = next(iter(bad))
    with pytest.raises(ValueError, match=rf"{name}.* must|not {name} = "):
        soft_token(torch.zeros(2, 50, device=device), **{"top_k": 5, "k_max": 8} | _with_names(bad))


def _with_names(bad):
    noise = bad.get("noise")
    return bad | {"noise": NOISES[noise]} if noise in range(len(NOISES)) else bad


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_default_says_what_to_pass(device):
    with pytest.raises(ValueError, match=r"not top_k = -1; give top_k .* or mode=1"):
        soft_token(torch.zeros(2, 50, device=device))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 2.7}, "top_k must be an integer"),
        ({"top_k": torch.tensor([2.7, 1.0])}, "top_k must hold integers"),
        ({"uid": torch.arange(3)}, r"uid must be a number or \[2\], not \[3\]"),
        ({"temperature": torch.ones(2, 1)}, r"temperature must be a number or \[2\], not"),
        ({"noise_clamp": torch.zeros(3, 2)}, r"noise_clamp must be a number or \[2\]"),
        ({"noise_clamp": (1.0, 2.0, 3.0)}, "noise_clamp must be"),
        ({"seed": 2**64}, "seed must fit into a signed word"),
        ({"temperature": "1"}, "temperature must be a number"),
        ({"temperature": torch.nan, "mode": torch.tensor([2, 2])}, "temperature must be"),
        ({"k_max": 2.5}, "k_max must be"),
    ],
)
def test_bad_types_and_shapes_are_named_on_every_device(device, arguments, message):
    with pytest.raises(ValueError, match=message):
        soft_token(torch.zeros(2, 50, device=device), **{"top_k": 5, **arguments})
