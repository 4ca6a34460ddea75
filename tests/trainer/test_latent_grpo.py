"""Latent-GRPO's surrogate (arXiv 2604.27998): log q over the vocabulary, a mirrored gradient."""

import pytest
import torch
from tiny_decoder import make_decoder

import softgrpo.learner.policy
from softgrpo.algorithm.positions import DensitySettings
from softgrpo.learner.policy import Policy
from softgrpo.rollout.batch import RolloutBatch
from softgrpo_engine import LLM, SamplingParams, SoftParams
from softgrpo_kernels import linear_soft_logprob, soft_density
from softgrpo_kernels.methods import method_of
from softgrpo_kernels.methods.method import Rollout

METHOD = method_of("gumbel", "latent_grpo")


def released(logits, ids, gprime, advantages):
    """`logprobs_from_logits_topk_gumbel` of verl/utils/torch_functional.py in DJC-GO-SOLO's
    Latent-GRPO, for rows whose K slots are all in use."""
    logp = logits.log_softmax(-1).gather(-1, ids)
    diff = gprime - logp
    standard = -diff - (-diff).exp()
    flip = ((advantages[:, None].expand_as(diff) <= 0) & (diff < 0)).double()
    flipped = diff - diff.exp()
    proxy = (1.0 - flip) * standard + flip * flipped
    return (standard.detach() + (proxy - proxy.detach())).sum(-1) / ids.shape[-1]


def test_value_and_gradient_are_those_of_the_released_code():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 30, generator=generator, dtype=torch.float64)
    ids = logits.topk(6).indices
    noise = -torch.rand(200, 6, generator=generator, dtype=torch.float64).log().neg().log()
    gprime = logits.log_softmax(-1).gather(-1, ids) + noise.clamp(-1.5, 3)
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.5]).repeat(50)
    moved, results = 0.3 * torch.randn(200, 30, generator=generator), []
    for ours in (True, False):
        leaf = (logits + moved).requires_grad_()
        if ours:
            logq = leaf.log_softmax(-1).gather(-1, ids)
            value = METHOD.density(logq, gprime, Rollout(rewarded=advantages > 0))
        else:
            value = released(leaf, ids, gprime, advantages)
        value.sum().backward()
        results.append((value.detach(), leaf.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    logq = leaf.detach().log_softmax(-1).gather(-1, ids)
    assert ((gprime < logq) & (advantages <= 0)[:, None]).any()
    # The advantage decides the gradient, never the value.
    torch.testing.assert_close(soft_density(logq, gprime, objective="latent_grpo"), results[0][0])


def test_dead_slots_count_in_nothing_and_a_nan_shows():
    logq = torch.tensor([[-1.0, -2.0], [-1.0, -2.0], [-1.0, -2.0]], requires_grad=True)
    gprime = torch.tensor([[-1.5, -torch.inf], [-torch.inf, -torch.inf], [torch.nan, -2.0]])
    for rewarded in (None, torch.zeros(3, dtype=torch.bool)):
        logq.grad = None
        out = METHOD.density(logq, gprime, Rollout(rewarded=rewarded))
        assert out[0].item() == pytest.approx(0.5 - torch.tensor(0.5).exp().item())
        assert out[1] == 0
        assert out[2].isnan()
        out[:2].sum().backward()
        slope = 1 - torch.tensor(0.5).exp() if rewarded is None else torch.tensor(-0.5).exp() - 1
        torch.testing.assert_close(logq.grad[:2], torch.tensor([[slope.item(), 0.0], [0.0, 0.0]]))


def test_the_policy_scores_over_the_vocabulary(monkeypatch):
    """Against all logits of the same decoder: value, and gradient in the weights."""
    soft = SoftParams(top_k=5, top_p=0.9, noise_clip=(-1.5, 3.0), end_of_thinking=2)
    engine = LLM(make_decoder(), kv_memory=0.01, max_batch_size=16)
    outputs = engine.generate_groups(
        [[5, 6, 7], [5, 6]],
        SamplingParams(max_tokens=9, top_k=5),
        soft,
        seed=3,
        uids=[[1, 2], [3, 4]],
    )
    batch = RolloutBatch.from_outputs(outputs, seed=3, stream=0, weight_version=0)
    rewarded = torch.arange(len(batch.soft.token)) % 3 == 0
    settings = DensitySettings(METHOD, soft_temperature=0.7)
    policy, plain = (Policy(make_decoder(), settings, torch.float32) for _ in range(2))
    rows = batch.soft.kind.bool()
    density = policy(batch, rewarded).density[rows]
    density.sum().backward()

    hidden, score = [], softgrpo.learner.policy.score

    def noted(hidden_TH, *arguments, **options):
        hidden.append(hidden_TH)
        return score(hidden_TH, *arguments, **options)

    monkeypatch.setattr(softgrpo.learner.policy, "score", noted)
    plain(batch)
    logits = (hidden[0] @ plain.decoder.lm_head_weight.T / 0.7)[rows]
    ids, gprime = batch.soft.ids[rows].long(), batch.soft.gprime[rows]
    logq = logits.log_softmax(-1).gather(-1, ids.clamp(min=0))
    u, live, rewarded = gprime - logq, ids >= 0, rewarded[rows]
    assert (~live).any()
    mirrored = ~rewarded[:, None] & (u < 0) & live
    assert mirrored.any()
    value = (-u - torch.exp(-u)).masked_fill(~live, 0.0)
    torch.testing.assert_close(density, value.sum(-1) / live.sum(-1), rtol=1e-4, atol=1e-5)
    slopes = torch.where(mirrored, u.exp() - 1, 1 - (-u).exp()).masked_fill(~live, 0.0)
    ((slopes / live.sum(-1, keepdim=True)).detach() * logq).sum().backward()
    for ours, theirs in zip(policy.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


def test_the_op_over_candidates_refuses_it():
    record = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2)
    one = torch.ones(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="'latent_grpo' needs log q over the vocabulary"):
        linear_soft_logprob(
            torch.zeros(1, 4), torch.zeros(9, 4), *record, one, one, one, objective="latent_grpo"
        )
