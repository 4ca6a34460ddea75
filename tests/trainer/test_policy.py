"""The trainer scores what the engine drew: on-policy equality, and the gradient of a toy reward."""

import math

import pytest
import torch
from tiny_decoder import CONFIG, make_decoder

from softgrpo.algorithm.density import log_densities, mismatch, rollout_logq
from softgrpo.algorithm.positions import DensitySettings
from softgrpo.learner.policy import Policy
from softgrpo.rollout.batch import RolloutBatch
from softgrpo_engine import LLM, SamplingParams, SoftParams
from softgrpo_kernels import gumbel_noise, soft_density, soft_weights
from softgrpo_kernels.methods import method_of


def roll(soft, params=None, groups=2, samples=4, tied=True):
    """A rollout of a tiny random model, and the decoder with the weights that wrote it."""
    shape = {"num_hidden_layers": 2, "tie_word_embeddings": tied}
    engine = LLM(make_decoder(**shape), kv_memory=0.01, max_batch_size=16)
    params = params or SamplingParams(max_tokens=12, temperature=0.8, top_k=6, top_p=0.9)
    prompts = [[5, 6, 7, 8, 9][: 3 + g] for g in range(groups)]
    uids = [[10 * g + s for s in range(samples)] for g in range(groups)]
    outputs = engine.generate_groups(prompts, params, soft or False, seed=3, uids=uids)
    batch = RolloutBatch.from_outputs(outputs, seed=3, stream=0, weight_version=0)
    return batch, make_decoder(**shape)


THINKING = {"end_of_thinking": 2}
CASES = {
    # soft to the end; soft, then an answer at another temperature; a budget that forces the end;
    # a budget without an end-of-thinking token; discrete over candidates; over the vocabulary.
    "exact": ("exact", {}, {}),
    "answer": ("exact", {"temperature": 1.3, **THINKING}, {}),
    "budget": ("exact", {"max_soft_tokens": 3, **THINKING}, {}),
    "budget-no-end": ("exact", {"max_soft_tokens": 3}, {}),
    "exact-budget": (
        "exact",
        {"max_soft_tokens": 3, "min_soft_tokens": 3, "end_of_thinking": 40},
        {},
    ),
    "concrete": ("concrete", {"tau": 0.7}, {}),
    "censored": ("censored", {"tau": 0.7, "weight_floor": 0.2, **THINKING}, {}),
    "official": (
        "official",
        {"noise_clip": (-1.5, 3.0), "eps": 1e-6, **THINKING},
        {},
    ),
    "half-scale": ("exact", {"noise_scale": 0.5, **THINKING}, {}),
    "dirichlet": ("exact", {"noise": "dirichlet", "tau": 1.0, "noise_scale": 2.0, **THINKING}, {}),
    "gaussian": ("exact", {"noise": "gaussian", "tau": 1.0, "noise_scale": 0.2, **THINKING}, {}),
    **{
        f"{noise}-{objective}": (
            objective,
            {"noise": noise, "tau": 1.0, "noise_scale": 3.0, **THINKING},
            {},
        )
        for noise, objective in (
            ("multiplex", "exact"),
            ("multiplex_weighted", "slot_mean"),
            ("multiplex", "per_slot"),
            ("mixture_of_inputs", "token"),
            ("mean", "token"),
        )
    },
    "embedding": ("exact", {"noise": "embedding", "tau": 1.0, **THINKING}, {}),
    "embedding-tau": ("exact", {"noise": "embedding", "tau": 0.4, "noise_scale": 0.3}, {}),
    "discrete": ("exact", None, {}),
    "discrete-full": ("exact", None, {"top_k": -1, "top_p": 1.0}),
}


def settings_of(objective, soft, params):
    return DensitySettings(
        method_of(soft.noise if soft else "gumbel", objective),
        tau=soft.tau if soft else 0.1,
        weight_floor=soft.weight_floor if soft else 0.0,
        noise_scale=soft.noise_scale if soft else 1.0,
        soft_temperature=soft.temperature if soft else 1.0,
        discrete_temperature=params.temperature,
        discrete_full=params.top_k <= 0,
        discrete_listed=params.top_k > 0,
        soft_enabled=soft is not None,
        max_soft_tokens=soft.max_soft_tokens if soft else None,
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_trainer_equals_rollout_on_policy(case, tied):
    objective, soft, extra = CASES[case]
    soft = None if soft is None else SoftParams(top_k=5, top_p=0.9, **soft)
    params = SamplingParams(
        **{"max_tokens": 12, "temperature": 0.8, "top_k": 6, "top_p": 0.9, **extra}
    )
    batch, decoder = roll(soft, params, tied=tied)
    settings = settings_of(objective, soft, params)
    policy = Policy(decoder, settings, torch.float32)
    with torch.no_grad():
        ours = policy(batch)
    positions, classes = ours.positions, ours.positions.classes
    theirs = rollout_logq(positions, settings)
    if bool((classes.soft | classes.candidates).any()):
        difference, known = mismatch(ours.candidates, theirs, classes)
        assert difference[known].max() < 1e-4
    chosen = classes.candidates | classes.full
    # An ending token that is not a sample from p.
    if settings.method.ending_scale(settings.noise_scale) != 1.0:
        chosen &= ~classes.soft_phase
    if objective != "official":  # whose ending token is scored over more than it was drawn from
        error = (ours.density - positions.logprobs)[chosen].abs()
        assert error.numel() == 0 or error.max() < 1e-4
    if objective == "exact" and settings.method.keeps_logp and soft is not None:
        rows = classes.soft
        behaviour = log_densities(theirs, positions.logprobs, positions, settings)
        error = (ours.density - behaviour)[rows].abs()
        noise = gumbel_noise(positions.ids, 3, positions.position, positions.uid)
        energy = torch.where(positions.ids >= 0, (1 - torch.exp(-noise)).abs(), 0.0).sum(-1)
        assert error.mean() < 1e-4
        assert (error <= 1e-4 * (1 + energy[rows])).all()
    if case == "exact-budget":
        assert batch.soft.kind.sum() == 3 * 8
    if case == "budget":
        assert batch.soft.forced.any()
        assert (ours.density[batch.soft.forced] == 0).all()
        assert (batch.soft.token[batch.soft.forced] == 2).all()
    assert classes.soft.any() == (soft is not None)


def test_changed_weights_show_as_mismatch():
    """The check above can fail: one weight off, and it does."""
    soft = SoftParams()
    batch, decoder = roll(soft)
    with torch.no_grad():
        decoder.model.layers[0].mlp.down_proj.weight[0] += 0.5
    settings = DensitySettings(discrete_temperature=0.8)
    ours = Policy(decoder, settings, torch.float32)(batch)
    theirs = rollout_logq(ours.positions, settings)
    difference, known = mismatch(ours.candidates, theirs, ours.positions.classes)
    assert difference[known].max() > 1e-2


def test_no_gradient_through_soft_inputs():
    """Only the output side of a tied table gets a gradient from soft positions: ids that were
    neither prompt nor candidate stay at exactly 0."""
    batch, decoder = roll(SoftParams())
    policy = Policy(decoder, DensitySettings(discrete_temperature=0.8), torch.float32)
    policy(batch).density.sum().backward()
    touched = set(batch.prompt_ids.tolist()) | set(batch.soft.ids.flatten().tolist())
    gradient = decoder.embed_weight.grad.abs().sum(-1)
    untouched = [i for i in range(CONFIG["vocab_size"]) if i not in touched]
    assert untouched
    assert (gradient[untouched] == 0).all()
    assert (gradient[sorted(touched - {-1})] > 0).any()


@pytest.mark.parametrize("objective", ["exact", "concrete"])
def test_policy_gradient_is_the_gradient_of_the_expected_reward(objective):
    """One soft position with three candidates, reward = a function of the mixture: the score
    estimator against finite differences of the expected reward, on common random numbers."""
    tau, n, step = 0.5, 400_000, 0.02
    z = torch.tensor([0.4, -0.3, 0.1], dtype=torch.float64)
    ids = torch.arange(3).expand(n, 3)
    noise = gumbel_noise(ids, 11, torch.arange(n) % 997, torch.arange(n)).double()
    values = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)

    def rewards(logits):
        gprime = logits.log_softmax(-1) + noise
        weights = soft_weights(gprime.float(), torch.ones(n, dtype=torch.uint8), tau).double()
        return (weights @ values).square(), gprime

    reward, gprime = rewards(z)
    u = gprime - z.log_softmax(-1)
    score = 1 - torch.exp(-u) if objective == "exact" else 1 - 3 * torch.softmax(-u, -1)
    # dl/dz_j = s_j - q_j sum s; a baseline lowers the variance and changes no expectation.
    dz = score - torch.softmax(z, -1) * score.sum(-1, keepdim=True)
    samples = (reward - reward.mean())[:, None] * dz
    estimate, error = samples.mean(0), samples.std(0) / math.sqrt(n)
    for j in range(3):
        shift = torch.zeros(3, dtype=torch.float64)
        shift[j] = step
        difference = (rewards(z + shift)[0] - rewards(z - shift)[0]).mean() / (2 * step)
        assert abs(estimate[j] - difference) < 4 * error[j] + 1e-3
        assert abs(difference) > 20 * error[j] or j == 2  # the comparison has power
    # The same gradient from the trainer's own density.
    leaf = z.clone().requires_grad_()
    density = soft_density(leaf.log_softmax(-1).expand(n, 3), gprime, objective=objective)
    ((reward - reward.mean()) * density).mean().backward()
    torch.testing.assert_close(leaf.grad, estimate, atol=1e-9, rtol=1e-6)
