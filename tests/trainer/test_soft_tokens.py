"""Soft Tokens: the trainer reads the inputs that the engine fed, and scores what was chosen."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_decoder import make_decoder

from softgrpo.algorithm.positions import DensitySettings
from softgrpo.config.sections import AlgorithmConfig
from softgrpo.distributed import World
from softgrpo.learner.packing import PackedInputs
from softgrpo.learner.passes import Passes
from softgrpo.learner.policy import Policy
from softgrpo.rollout.batch import RolloutBatch
from softgrpo_engine import LLM, SamplingParams, SoftParams
from softgrpo_kernels import embedding_noise, soft_embedding, soft_weights
from softgrpo_kernels.methods import method_of

# A budget ends thinking.
SOFT = SoftParams(
    noise="embedding", tau=0.8, noise_scale=0.7, top_p=1.0, end_of_thinking=2, max_soft_tokens=6
)
SETTINGS = DensitySettings(
    method_of("embedding", "exact"),
    tau=0.8, noise_scale=0.7, discrete_temperature=0.8, max_soft_tokens=6,
)  # fmt: skip
PARAMS = SamplingParams(max_tokens=12, temperature=0.8, top_k=6, ignore_eos=True)
PROMPTS, UIDS = [[5, 6, 7], [5, 6, 7, 8]], [[3, 4, 5, 6], [7, 8, 9, 10]]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


def roll(monkeypatch, dtype, soft=SOFT):
    """A rollout, and the inputs that the engine fed for each soft position, by (uid, position)."""
    llm = LLM(make_decoder().to(dtype), kv_memory=0.01, max_batch_size=16)
    runner, fed = llm.runner, {}
    mixtures = runner._mixtures

    def watched(rows, index, deviation, before=0):
        result = mixtures(rows, index, deviation, before)
        index = index - before
        _, position, uid, _ = runner.record.noise_keys(rows, index)
        soft = runner.record.drawn.kind[rows, index]
        names = zip(uid.tolist(), position.tolist(), soft.tolist(), strict=True)
        for name, row in zip(names, result, strict=True):
            if name[2]:
                fed.setdefault(name[:2], []).append(row.clone())
        return result

    monkeypatch.setattr(runner, "_mixtures", watched)
    outputs = llm.generate_groups(PROMPTS, PARAMS, soft, seed=3, uids=UIDS)
    batch = RolloutBatch.from_outputs(outputs, seed=3, stream=0, weight_version=0)
    return batch, fed


def test_the_trainer_s_inputs_have_the_bits_of_the_engine_s(monkeypatch, dtype):
    batch, fed = roll(monkeypatch, dtype)
    policy = Policy(make_decoder(), SETTINGS, dtype)
    positions = policy(batch).positions
    packed = PackedInputs.of(batch)
    rows = policy._embed(packed, positions)[packed.mixed]
    keys = (x[packed.mixed_from].tolist() for x in (positions.uid, positions.position))
    seen = list(zip(*keys, strict=True))
    assert set(seen) == set(fed)
    for name, row in zip(seen, rows, strict=True):
        assert all(torch.equal(row, other) for other in fed[name])


def test_what_is_fed_is_the_mixture_with_noise_of_its_own_position(monkeypatch):
    """Said without the engine: the mean and the noise of one position."""
    batch, fed = roll(monkeypatch, torch.float32)
    table = make_decoder().embed_weight.detach()
    sample = 5
    rows = (batch.sample_of_token == sample).nonzero()[:, 0]
    for row in rows[batch.soft.kind[rows] == 1]:
        uid, position = int(batch.uid[sample]), int(batch.position[row])
        weights = soft_weights(batch.soft.gprime[row], batch.soft.kind[row], 0.8)
        noise = embedding_noise(table.shape[1], 3, torch.tensor([position]), uid, 0)[0]
        expected = soft_embedding(batch.soft.ids[row], weights, table)
        expected = expected + 0.7 * table.square().mean().sqrt() * noise
        torch.testing.assert_close(fed[uid, position][0], expected)


def test_the_end_of_thinking_by_the_argmax_is_no_choice(monkeypatch):
    """It is the policy's function: no score, no part in the loss, as where a budget forces it."""
    free, _ = roll(monkeypatch, torch.float32)
    tokens = free.soft.token[:6].tolist()  # of the first sample
    end = next(token for token in tokens if token != tokens[0])
    batch, _ = roll(monkeypatch, torch.float32, replace(SOFT, end_of_thinking=end))
    policy = Policy(make_decoder(), SETTINGS, torch.float32)
    ours = policy(batch)
    classes = ours.positions.classes
    chosen_by_policy = classes.forced & ~batch.soft.forced
    assert chosen_by_policy[tokens.index(end)]
    assert batch.soft.forced.any()
    assert (batch.soft.token[classes.forced] == end).all()
    assert (ours.density[classes.forced] == 0).all()
    assert (ours.density[classes.candidates] != 0).any()
    config = SimpleNamespace(algorithm=AlgorithmConfig())
    assert torch.equal(Passes(policy, None, batch, config, World()).mask_T, ~classes.forced)


def test_a_batch_of_several_methods_gives_each_its_own():
    """Rows without the noise are fed without it, whoever shares their step."""
    llm = LLM(make_decoder(), kv_memory=0.01, max_batch_size=16)
    plain = SoftParams(tau=0.8, noise="none", end_of_thinking=None)
    noisy = SoftParams(tau=0.8, noise="embedding", end_of_thinking=None)

    def draw(*softs):
        calls = [
            llm.submit([PROMPTS[0]], PARAMS, soft, seed=3, uids=[[uid]])
            for uid, soft in enumerate(softs)
        ]
        while llm.scheduler.has_work:
            llm.step()
        samples = [call.sequences[0].sample for call in calls]
        for call in calls:
            llm.release(call)
        return samples

    together = draw(plain, noisy, False)
    for uid, soft in enumerate((plain, noisy, False)):
        alone = llm.generate_groups([PROMPTS[0]], PARAMS, soft, seed=3, uids=[[uid]])[0].samples[0]
        torch.testing.assert_close(
            alone.soft.gprime, together[uid].soft.gprime, atol=1e-3, rtol=1e-3
        )
    assert not torch.allclose(together[0].soft.gprime, together[1].soft.gprime)
