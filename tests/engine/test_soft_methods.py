"""The family of soft-thinking methods, as parameters of one engine."""

import pytest
import torch

from softgrpo_engine import SamplingParams, SoftParams
from softgrpo_kernels.methods import SOFT_NOISES

METHODS = {
    "none": SoftParams(noise="none", tau=1.0, end_of_thinking=None),
    "dirichlet": SoftParams(noise="dirichlet", noise_scale=4.0, tau=1.0, end_of_thinking=None),
    "gaussian": SoftParams(noise="gaussian", noise_scale=0.1, tau=1.0, end_of_thinking=None),
    "multiplex": SoftParams(noise="multiplex", noise_scale=3, tau=1.0, end_of_thinking=None),
    "multiplex_weighted": SoftParams(
        noise="multiplex_weighted", noise_scale=3, tau=1.0, end_of_thinking=None
    ),
    "mixture_of_inputs": SoftParams(noise="mixture_of_inputs", tau=1.0, end_of_thinking=None),
    "mean": SoftParams(noise="mean", tau=1.0, end_of_thinking=None),
    "embedding": SoftParams(noise="embedding", tau=1.0, end_of_thinking=None),
}


def test_every_noise_is_here():
    assert {"gumbel", *METHODS} == set(SOFT_NOISES)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_reproducible_and_its_record_gives_the_weights(make_llm, prompts, method):
    params = SamplingParams(max_tokens=8, ignore_eos=True, n=3, seed=5)
    soft = METHODS[method]
    first, again = (
        make_llm().generate(prompts[0], params, soft, progress=False)[0].samples for _ in range(2)
    )
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.soft.ids, b.soft.ids)
        assert torch.equal(a.soft.gprime, b.soft.gprime)
    # Weights are softmax(g'), tau 1: for these methods g' is their logarithm up to a constant.
    live = first[0].soft.ids >= 0
    weights = torch.where(live, first[0].soft.gprime.exp(), 0.0)
    if method == "multiplex":
        torch.testing.assert_close(weights * 3, (weights * 3).round(), atol=1e-5, rtol=0)
    if method not in ("gaussian", "multiplex_weighted"):
        torch.testing.assert_close(weights.sum(-1), torch.ones(8))
    if method == "none":
        assert torch.equal(first[0].soft.gprime, first[1].soft.gprime)
    else:
        assert not torch.equal(first[0].soft.gprime, first[1].soft.gprime)


def test_what_a_sample_draws_does_not_depend_on_its_neighbour(make_llm, prompts):
    params = SamplingParams(max_tokens=6, ignore_eos=True, seed=5)
    llm = make_llm()
    for soft in METHODS.values():
        alone = llm.generate(prompts[0], params, soft, progress=False)[0].samples[0]
        other = llm.generate([prompts[1], prompts[0]], params, soft, progress=False)[1].samples[0]
        assert alone.token_ids == other.token_ids


def test_noise_on_mixtures_comes_again_after_preemption(make_llm, prompts):
    params = SamplingParams(max_tokens=40, ignore_eos=True, n=3, seed=5)
    plenty, few = make_llm(max_batch_size=32), make_llm(max_batch_size=32, pages=9)
    expected, samples = (
        [
            s
            for o in llm.generate(prompts, params, METHODS["embedding"], progress=False)
            for s in o.samples
        ]
        for llm in (plenty, few)
    )
    assert few.metrics()["preemptions"] > 0
    for a, b in zip(expected, samples, strict=True):
        assert torch.equal(a.soft.ids, b.soft.ids)
        torch.testing.assert_close(a.soft.gprime, b.soft.gprime, atol=1e-3, rtol=1e-3)


def test_the_stream_leaves_room_for_the_noise_on_mixtures(make_llm, prompts):
    with pytest.raises(ValueError, match="stream 65536 is not allowed: must be >= 0 and < 2\\^16"):
        make_llm().submit(
            prompts[:1], SamplingParams(max_tokens=8), METHODS["embedding"], stream=2**16
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise": "uniform"}, "noise"),
        ({"noise": "multiplex", "noise_scale": 2.5}, "draws"),
        ({"noise": "multiplex", "noise_scale": 100}, "draws"),
        ({"noise": "mean", "weight_floor": 0.1}, "set weight_floor=0"),
        ({"noise": "embedding", "weight_floor": 0.1}, "smooth function .* set weight_floor=0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SoftParams(**settings)
