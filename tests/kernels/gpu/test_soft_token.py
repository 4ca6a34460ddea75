"""The Triton soft step against the reference, on small rows (the interpreter is slow)."""

from dataclasses import fields

import pytest
import torch
from gpu_cases import compare
from logit_styles import logits_of

from softgrpo_kernels import SoftToken, soft_token, soft_weights
from softgrpo_kernels.methods import NOISES, method_of

GREEDY, DISCRETE, SOFT, SKIP = range(4)
STYLES = ["plain", "equal", "integers", "signed zeros", "masked", "one", "negative"]


@pytest.mark.parametrize("style", STYLES)
def test_candidates(device, style):
    """Fewer tokens than slots, one tile, several tiles; rows at odd distances."""
    for vocabulary, dtype in ((5, torch.float32), (129, torch.bfloat16), (1000, torch.float16)):
        logits = logits_of(style, 2, vocabulary + 3, dtype)[:, 3:]
        embed = torch.randn(vocabulary, 9).to(dtype)
        compare(device, logits, embed, k_max=8, top_k=7, top_p=0.913, temperature=0.7)


def test_a_vocabulary_of_several_chunks(device):
    logits = logits_of("integers", 1, 9001, torch.bfloat16)
    compare(device, logits, torch.randn(9001, 8), k_max=16, top_k=16, top_p=0.97)


def every_mode():
    return {
        "mode": torch.tensor([GREEDY, DISCRETE, SOFT, SKIP, SOFT, SOFT]),
        "top_k": torch.tensor([0, 7, 5, 0, 8, 8]),
        "top_p": torch.tensor([1, 0.9, 0.95, 1, 1, 0.8]),
        "min_p": torch.tensor([0, 0, 0, 0, 0.01, 0]),
        "temperature": torch.tensor([0, 0.7, 1, 0, 1.3, 1]),
        "gumbel_tau": torch.tensor([0.1, 0.1, 0.1, 0.1, 1, 1]),
        "weight_floor": torch.tensor([0, 0, 0.1, 0, 0.01, 1]),
        "eps": torch.tensor([0, 0, 1e-6, 0, 0, 0]),
        "noise_scale": torch.tensor([1, 1, 0.5, 1, 2, 1]),
        "noise_clamp": torch.tensor([[-1.5, 3.0]]).expand(6, 2),
        "seed": 2**41 + 5,
        "position": torch.arange(6),
        "uid": torch.arange(6) + 2**32 - 6,
    }


@pytest.mark.parametrize("order", ["top_k_first", "joint"])
def test_every_mode_in_one_batch(device, order):
    logits = logits_of("plain", 6, 300)
    settings = every_mode()
    free = soft_token(logits, **settings, k_max=8, order=order)
    terminal = torch.full((6, 2), -1)
    terminal[4, 1] = free.token[4]
    out = compare(
        device, logits, torch.randn(300, 9), k_max=8, order=order, terminal_ids=terminal, **settings
    )
    assert out.kind.tolist() == [0, 0, 1, 0, 0, 1]


SCALES = {"dirichlet": 4.0, "gaussian": 0.1, "mixture_of_inputs": 0.5}


@pytest.mark.parametrize("noise", NOISES[1:])
def test_every_kind_of_noise(device, noise):
    # The low bits of weighted multiplex hold a count: an ulp of log p moves g' by 64.
    rtol = 1e-5 if noise == "multiplex_weighted" else 2e-6
    compare(
        device, logits_of("plain", 3, 200), torch.randn(200, 9), k_max=8, top_k=8, noise=noise,
        noise_scale=SCALES.get(noise, 3.0), gumbel_tau=1.0, position=torch.arange(3), rtol=rtol,
    )  # fmt: skip


def test_one_draw_of_multiplex_is_a_discrete_token(device):
    logits = logits_of("plain", 3, 200).to(device)
    settings = {"k_max": 8, "top_k": 7, "top_p": 0.9, "position": torch.arange(3, device=device)}
    one = soft_token(logits, noise="multiplex", backend="triton", **settings)
    discrete = soft_token(logits, mode=DISCRETE, backend="triton", **settings)
    assert torch.equal(one.token, discrete.token)
    assert torch.equal(one.token_logp, discrete.token_logp)
    assert torch.equal(one.ids.sort().values, discrete.ids.sort().values)
    assert torch.equal(one.weights, discrete.weights)


def test_counts_of_weighted_multiplex_come_back(device):
    """The integers that the low bits of g' hold are exact, whatever the rounding of log p."""
    logits = logits_of("plain", 3, 200).to(device)
    settings = {"k_max": 8, "top_k": 7, "noise_scale": 5.0, "position": torch.arange(3)}
    settings = {k: v.to(device) if torch.is_tensor(v) else v for k, v in settings.items()}
    out = soft_token(logits, noise="multiplex_weighted", backend="triton", **settings)
    plain = soft_token(logits.cpu(), noise="multiplex", **settings | {"position": torch.arange(3)})
    for row in range(3):
        counts = method_of("multiplex_weighted").counts(out.gprime[row].cpu(), 5.0)
        expected = method_of("multiplex").counts(plain.gprime[row], 5.0)
        assert dict(zip(out.ids[row].tolist(), counts.tolist(), strict=True)) == dict(
            zip(plain.ids[row].tolist(), expected.tolist(), strict=True)
        )


@pytest.mark.parametrize("options", [{}, {"softcap": 20.0, "logit_scale": 0.5}])
def test_candidates_are_scored_again_by_the_head(device, options):
    # Tables whose rows are not contiguous, as a transposed weight is.
    hidden, head = torch.randn(70, 2).T, torch.randn(70, 300).T
    bias = torch.randn(300) if options else None
    compare(
        device, hidden @ head.T, torch.randn(300, 9), k_max=8, top_k=6, temperature=9.0,
        hidden=hidden, lm_head=head, bias=bias, **options,
    )  # fmt: skip


@pytest.mark.parametrize("tau", [0.1, 0.7])
def test_weights_are_those_that_the_trainer_computes_from_the_record(device, tau):
    logits, embed = logits_of("plain", 6, 300), torch.randn(300, 8)
    out = compare(device, logits, embed, k_max=8, top_k=8, gumbel_tau=tau, position=torch.arange(6))
    assert torch.equal(out.weights, soft_weights(out.gprime, out.kind, tau))


def test_bad_rows_are_marked(device):
    logits = logits_of("plain", 5, 300)
    logits[0, 299], logits[1, 0], logits[2], logits[3] = (
        torch.nan, torch.inf, -torch.inf, torch.nan,
    )  # fmt: skip
    mode = torch.tensor([SOFT, DISCRETE, SOFT, SKIP, SOFT])
    out = compare(device, logits, torch.randn(300, 4), k_max=4, top_k=4, mode=mode)
    assert out.valid.tolist() == [False] * 3 + [True] * 2


def test_a_row_does_not_depend_on_its_batch(device):
    logits, settings = logits_of("integers", 6, 300).to(device), every_mode()
    settings = {k: v.to(device) if torch.is_tensor(v) else v for k, v in settings.items()}
    settings["seed"] = torch.full((6,), 3, device=device)
    options = {"need_lse": True, "k_max": 8, "backend": "triton"}
    together = soft_token(logits, **settings, **options)
    order = torch.randperm(6, device=device)
    moved = soft_token(logits[order], **{k: v[order] for k, v in settings.items()}, **options)
    for field in fields(SoftToken):
        a, b = getattr(together, field.name), getattr(moved, field.name)
        if a is not None:
            assert torch.equal(a[order].nan_to_num(-7), b.nan_to_num(-7)), field.name
    alone = soft_token(logits[4:5], **{k: v[4:5] for k, v in settings.items()}, **options)
    assert torch.equal(alone.gprime[0], together.gprime[4])
    assert torch.equal(alone.weights[0], together.weights[4])


def test_no_rows(device):
    out = soft_token(torch.empty(0, 7, device=device), top_k=2, backend="triton")
    assert out.ids.shape == (0, 2)  # as many slots as top_k
