"""The classes of positions, their densities, and what is recovered of the rollout."""

import math

import pytest
import torch

from softgrpo.algorithm.density import log_densities, mismatch, rollout_logq
from softgrpo.algorithm.positions import DensitySettings
from softgrpo.rollout.batch import RolloutBatch
from softgrpo_engine import SoftTokens
from softgrpo_kernels import gumbel_noise, soft_token
from softgrpo_kernels.methods import method_of

V, K = 23, 4


def make_batch(
    kinds, forced=None, *, eps=0.0, noise_clamp=None, noise="gumbel", noise_scale=1.0, seed=5
):
    """Samples of one group, recorded from random logits by the op itself."""
    lens = [len(k) for k in kinds]
    total = sum(lens)
    prompt_len = 3
    kind = torch.tensor([x for k in kinds for x in k], dtype=torch.uint8)
    uid = torch.arange(len(kinds)) + 100
    owner = torch.repeat_interleave(torch.arange(len(kinds)), torch.tensor(lens))
    position = torch.cat([torch.arange(n) for n in lens]) + prompt_len
    logits = 2 * torch.randn(total, V, generator=torch.Generator().manual_seed(0))
    drawn = soft_token(
        logits,
        top_k=K,
        top_p=0.9,
        k_max=K,
        seed=seed,
        position=position,
        uid=uid[owner],
        eps=eps,
        noise_clamp=noise_clamp,
        noise=noise,
        noise_scale=noise_scale,
        mode=1 + kind,
    )
    forced_T = torch.zeros(total, dtype=torch.bool)
    for i in forced or ():
        forced_T[i] = True
    batch = RolloutBatch(
        prompt_ids=torch.arange(prompt_len, dtype=torch.int32),
        prompt_lens=torch.tensor([prompt_len], dtype=torch.int32),
        group=torch.zeros(len(kinds), dtype=torch.int32),
        response_lens=torch.tensor(lens, dtype=torch.int32),
        soft=SoftTokens(drawn.ids, drawn.gprime, kind, forced_T, drawn.token),
        logprobs=drawn.token_logp,
        uid=uid,
        finish=torch.zeros(len(kinds), dtype=torch.uint8),
        seed=seed,
        stream=0,
        weight_version=torch.zeros(len(kinds), dtype=torch.int64),
    )
    return batch, drawn, logits


def test_positions_fall_into_exactly_one_class():
    # soft, soft, end of thinking, answer, answer | forced end after two soft | discrete at once
    kinds = [[1, 1, 0, 0, 0], [1, 1, 0, 0], [0, 0]]
    batch, _, _ = make_batch(kinds, forced=[7])
    for objective in ("exact", "official"):
        for full in (False, True):
            settings = DensitySettings(method_of("gumbel", objective), discrete_full=full)
            classes = batch.positions(settings).classes
            stacked = torch.stack([classes.soft, classes.candidates, classes.full, classes.forced])
            assert stacked.sum(0).eq(1).all()
    exact = batch.positions(DensitySettings()).classes
    # The end of thinking of sample 0 and the first token of sample 2 were drawn in the soft phase.
    expected = [1, 1, 1, 0, 0, 1, 1, 0, 0, 1, 0]
    assert exact.soft_phase.int().tolist() == expected
    assert not exact.full.any()
    official = batch.positions(DensitySettings(method_of("gumbel", "official"))).classes
    assert official.full.nonzero().flatten().tolist() == [2, 9]
    full = batch.positions(DensitySettings(discrete_full=True)).classes
    assert full.full.nonzero().flatten().tolist() == [3, 4, 8, 10]


def test_a_budget_ends_the_soft_phase():
    batch, _, _ = make_batch([[1, 1, 0, 0]])
    classes = batch.positions(DensitySettings(max_soft_tokens=2)).classes
    assert classes.soft_phase.tolist() == [True, True, False, False]


def test_discrete_rollouts_have_no_soft_phase():
    batch, _, _ = make_batch([[0, 0, 0]])
    classes = batch.positions(DensitySettings(soft_enabled=False)).classes
    assert not classes.soft_phase.any()
    assert classes.candidates.all()


@pytest.mark.parametrize("noise_scale", [1.0, 0.5])
def test_noise_comes_off_the_record_and_leaves_log_p(noise_scale):
    batch, drawn, _ = make_batch([[1, 1, 1], [1, 0, 0]], noise_scale=noise_scale)
    # Discrete positions keep exact Gumbel noise, whatever the scale: sample 1 ends its soft
    # phase at its second position, drawn here as a discrete row.
    settings = DensitySettings(noise_scale=noise_scale, max_soft_tokens=None)
    classes = batch.positions(settings).classes
    recovered = rollout_logq(batch.positions(settings), settings)
    rows = classes.soft
    live = drawn.ids[rows] >= 0
    assert torch.equal(recovered[rows].isfinite(), live)
    error = (recovered[rows] - drawn.logp[rows])[live].abs()
    assert error.max() < 1e-5
    # Against the definition: over the kept candidates the probabilities add up to 1.
    torch.testing.assert_close(
        recovered[rows].exp().sum(-1), torch.ones(int(rows.sum())), atol=1e-5, rtol=0
    )


def test_official_record_gives_the_kept_probabilities_back():
    batch, drawn, logits = make_batch([[1] * 6], eps=1e-6, noise_clamp=(-1.5, 3.0))
    settings = DensitySettings(method_of("gumbel", "official"))
    recovered = rollout_logq(batch.positions(settings), settings)
    top = torch.softmax(logits.topk(K, -1).values, -1)
    kept = (top.cumsum(-1) - top < 0.9).sum(-1)
    assert torch.equal(recovered.isfinite().sum(-1), kept)
    assert (drawn.ids >= 0).all()  # every slot is live on the record
    torch.testing.assert_close(recovered.exp().sum(-1), torch.ones(6), atol=2e-5, rtol=0)


@pytest.mark.parametrize("noise", ["multiplex", "multiplex_weighted", "mixture_of_inputs", "mean"])
def test_of_drawn_tokens_the_record_gives_what_it_holds(noise):
    """Candidates with g' = -inf are neither NaN nor a mismatch; a token that ends the soft phase is
    scored by log q itself, whatever the noise scale."""
    method = method_of(noise)
    batch, drawn, _ = make_batch([[1, 1, 1, 0]] * 3, noise=noise, noise_scale=3.0)
    settings = DensitySettings(method, tau=1.0, noise_scale=3.0)
    positions = batch.positions(settings)
    theirs = rollout_logq(positions, settings)
    difference, known = mismatch(drawn.logp, theirs, positions.classes)
    assert known[:, 0].all()
    assert torch.equal(theirs == -math.inf, drawn.ids < 0)
    if method.keeps_logp:
        soft = positions.classes.soft[:, None]
        assert torch.equal(known & soft, (drawn.ids >= 0) & soft)
    assert difference[known & positions.classes.soft[:, None]].max() < 1e-5
    logq = drawn.logp.clone().requires_grad_()
    density = log_densities(logq, drawn.token_logp, positions, settings)
    endings = positions.classes.candidates
    assert endings.sum() == 3
    torch.testing.assert_close(density[endings], drawn.token_logp[endings])
    density.sum().backward()
    assert logq.grad[drawn.ids >= 0].isfinite().all()


def test_mismatch_is_zero_for_the_same_probabilities_under_every_objective():
    for objective, extra in (
        ("exact", {}),
        ("concrete", {}),
        ("official", {"eps": 1e-6, "noise_clamp": (-1.5, 3.0)}),
    ):
        batch, _, logits = make_batch([[1] * 5, [1] * 2], **extra)
        settings = DensitySettings(method_of("gumbel", objective))
        classes = batch.positions(settings).classes
        ids = batch.soft.ids.long().clamp(min=0)
        kept = logits.gather(1, ids).masked_fill(batch.soft.ids < 0, -math.inf)
        logq = kept.log_softmax(-1)  # what the trainer computes: over all recorded slots
        theirs = rollout_logq(batch.positions(settings), settings)
        difference, known = mismatch(logq, theirs, classes)
        assert difference[known].max() < 2e-5, objective
        assert known.sum() == theirs.isfinite().sum()
        off, _ = mismatch(logq * 1.1, theirs, classes)
        assert off[known].max() > 1e-2


def test_exact_density_on_policy_is_that_of_the_noise():
    batch, drawn, _ = make_batch([[1, 1, 0], [1, 1]])
    settings = DensitySettings()
    classes = batch.positions(settings).classes
    logq = drawn.logp.double()
    density = log_densities(logq, torch.zeros(5).double(), batch.positions(settings), settings)
    noise = gumbel_noise(
        batch.soft.ids, 5, batch.position, batch.uid[batch.sample_of_token]
    ).double()
    expected = torch.where(drawn.ids >= 0, -noise - torch.exp(-noise), 0.0).sum(-1)
    torch.testing.assert_close(density[classes.soft], expected[classes.soft], atol=1e-4, rtol=1e-5)
    # The token that ended the soft phase: its log-probability over its candidates.
    assert density[2] == logq[2, 0]


def test_batch_saves_and_selects(tmp_path):
    batch, _, _ = make_batch([[1, 1, 0], [1, 1]])
    batch.save(tmp_path / "batch.safetensors")
    again = RolloutBatch.load(tmp_path / "batch.safetensors")
    assert again.seed == 5
    for name in ("ids", "gprime", "kind", "forced", "token"):
        assert torch.equal(getattr(again.soft, name), getattr(batch.soft, name))
    assert torch.equal(again.response_lens, batch.response_lens)
    part, rows = batch.select_samples([1])
    assert rows.tolist() == [3, 4]
    assert torch.equal(part.position, batch.position[3:])
    assert torch.equal(part.prompt_ids, batch.prompt_ids)
