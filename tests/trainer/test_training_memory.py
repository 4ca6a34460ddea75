"""The training pass against dense autograd, and what it keeps in memory."""

import pytest
import torch
from tiny_decoder import CONFIG, make_decoder
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from softgrpo.algorithm.positions import DensitySettings
from softgrpo.config.sections import OptimConfig, Sections
from softgrpo.learner.optimizer import make_optimizer
from softgrpo.learner.policy import Policy
from softgrpo.learner.update import Update
from softgrpo.rollout.batch import RolloutBatch
from softgrpo_engine import LLM, SamplingParams, SoftParams
from softgrpo_engine.training.group_attention import GroupAttention
from softgrpo_kernels import soft_density, soft_weights

HIDDEN, TOKENS = CONFIG["hidden_size"], 24
GROUPS, SAMPLES = 3, 8
SOFT = DensitySettings()
# Over the whole vocabulary: the expensive rows.
DISCRETE = DensitySettings(soft_enabled=False, discrete_full=True, discrete_listed=False)


@pytest.fixture(scope="module")
def batches():
    """(batch, settings) of a soft and of a discrete rollout of the same prompts."""
    engine = LLM(make_decoder(), kv_memory=0.01, max_batch_size=32)
    uids = [[10 * g + s for s in range(SAMPLES)] for g in range(GROUPS)]
    prompts = [[5, 6, 7, 8][: 2 + g] for g in range(GROUPS)]
    found = {}
    for name, settings, soft, sampling in (
        ("soft", SOFT, SoftParams(top_k=5), {"top_k": 5}),
        ("discrete", DISCRETE, False, {"top_k": -1, "top_p": 1.0}),
    ):
        params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, **sampling)
        outputs = engine.generate_groups(prompts, params, soft, seed=3, uids=uids)
        batch = RolloutBatch.from_outputs(outputs, seed=3, stream=0, weight_version=0)
        found[name] = batch, settings
    return found


def dense_densities(decoder, batch, settings):
    """What `Policy` computes, sample by sample, by logits over the whole vocabulary."""
    config, record, density = decoder.config, batch.soft, []
    prompts = batch.prompt_ids.split(batch.prompt_lens.tolist())
    start = 0
    for group, length in zip(batch.group.tolist(), batch.response_lens.tolist(), strict=True):
        rows, prompt = slice(start, start + length), prompts[group].long()
        start += length
        token, ids, gprime = record.token[rows].long(), record.ids[rows], record.gprime[rows]
        embeds = torch.nn.functional.embedding(token, decoder.embed_weight)
        if settings.soft_enabled:
            weights = soft_weights(gprime, record.kind[rows], settings.tau)
            mixture = torch.einsum(
                "tk,tkh->th", weights, decoder.embed_weight.detach()[ids.clamp(min=0).long()]
            )
            embeds = torch.where(record.kind[rows].bool()[:, None], mixture, embeds)
        prompt_embeds = torch.nn.functional.embedding(prompt, decoder.embed_weight)
        inputs = torch.cat([prompt_embeds, embeds[:-1]])
        attention = GroupAttention([len(inputs)], [[]], config.num_heads, config.num_kv_heads)
        hidden = decoder(inputs, torch.arange(len(inputs)), attention)[len(prompt) - 1 :]
        logits = hidden @ decoder.lm_head_weight.mT
        if settings.soft_enabled:
            assert record.kind[rows].all()
            logits = logits.gather(1, ids.clamp(min=0).long()).masked_fill(ids < 0, -torch.inf)
            density.append(soft_density(logits.log_softmax(-1), gprime))
        else:
            density.append(logits.log_softmax(-1).gather(1, token[:, None])[:, 0])
    return torch.cat(density)


def gradients(decoder):
    return {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}


def assert_equal_gradients(ours, expected, tolerance):
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        assert scale > 0, name
        assert (ours[name] - gradient).abs().max() < tolerance * scale, name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mode", ["soft", "discrete"])
def test_densities_and_gradients_equal_those_of_dense_autograd(batches, mode, tied):
    """The head's gradient goes into .grad beside autograd, in two passes here."""
    batch, settings = batches[mode]
    policy = Policy(make_decoder(tie_word_embeddings=tied), settings, torch.float32)
    weights = torch.linspace(-1.0, 1.0, len(batch.soft.token))
    ours = torch.zeros_like(weights)
    for samples in ([0, 1, 2, 20], [s for s in range(GROUPS * SAMPLES) if s not in (0, 1, 2, 20)]):
        part, rows = batch.select_samples(samples)
        density = policy(part).density
        (density * weights[rows]).sum().backward()
        ours[rows] = density.detach()
    decoder = make_decoder(tie_word_embeddings=tied).train()
    expected = dense_densities(decoder, batch, settings)
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours, expected.detach(), rtol=1e-4, atol=1e-4)
    assert_equal_gradients(gradients(policy.decoder), gradients(decoder), 1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_bf16_computation_leaves_float32_gradients(batches, tied):
    """Sums over passes are not rounded to bf16: the gradient of the same pass twice is double."""
    batch, settings = batches["soft"]
    policy = Policy(make_decoder(tie_word_embeddings=tied), settings, torch.bfloat16)
    policy(batch).density.sum().backward()
    once = gradients(policy.decoder)
    policy(batch).density.sum().backward()
    for name, gradient in gradients(policy.decoder).items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, 2 * once[name], rtol=1e-5, atol=1e-5)
    exact = Policy(make_decoder(tie_word_embeddings=tied), settings, torch.float32)
    exact(batch).density.sum().backward()
    for name, gradient in gradients(exact.decoder).items():
        error = (once[name] - gradient).norm() / gradient.norm()
        assert error < 0.1, name


@pytest.mark.parametrize("tied", [True, False])
def test_micro_batches_and_clipping_see_the_whole_gradient(batches, tied):
    batch, settings = batches["soft"]
    advantages = torch.linspace(-1.0, 1.0, GROUPS * SAMPLES)
    found = []
    for tokens, clip in ((4096, 1e9), (1, 1e9), (1, 1e-3)):
        policy = Policy(make_decoder(tie_word_embeddings=tied), settings, torch.float32)
        optim = OptimConfig(tokens_per_microbatch=tokens, grad_clip=clip)
        update = Update(policy, None, make_optimizer(policy.decoder, optim))
        row, _ = update(batch, advantages, 1e-6, Sections(optim=optim))
        found.append((row["grad_norm"], gradients(policy.decoder)))
    (norm, whole), (parts_norm, parts), (clipped_norm, clipped) = found
    assert norm == pytest.approx(parts_norm, rel=1e-4) == pytest.approx(clipped_norm, rel=1e-4)
    assert_equal_gradients(parts, whole, 1e-4)
    assert_equal_gradients(
        clipped, {name: gradient * (1e-3 / norm) for name, gradient in whole.items()}, 1e-4
    )


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0) if sizes else self.elements
        return out


def train_step(vocabulary, batch, settings):
    policy = Policy(make_decoder(vocab_size=vocabulary), settings, torch.bfloat16)
    config = Sections()
    update = Update(policy, None, make_optimizer(policy.decoder, config.optim))
    advantages = torch.linspace(-1.0, 1.0, GROUPS * SAMPLES)
    return lambda: update(batch, advantages, 1e-6, config)


@pytest.mark.parametrize("mode", ["soft", "discrete"])
def test_no_tensor_of_tokens_times_vocabulary(batches, mode, peak_memory):
    """A whole step, forward to optimizer, with two vocabularies."""
    batch, settings = batches[mode]
    small, large = 60_000, 120_000
    tokens = len(batch.soft.token)
    assert tokens == GROUPS * SAMPLES * TOKENS
    with LargestTensor() as largest:
        train_step(large, batch, settings)()
    # The tables are there, and slices of the logits of discrete rows, of at most 2^24.
    assert large * HIDDEN <= largest.elements <= 2**24 < tokens * small
    peaks = [peak_memory(train_step(size, batch, settings)) for size in (small, large)]
    # Gradient, two moments, copies in bf16: a few tables. One [T, V] alone would be 36 of them.
    assert peaks[1] - peaks[0] < 5 * (large - small) * HIDDEN * 4


def test_gradient_checkpointing_changes_no_bit_and_takes_less_memory(batches, peak_memory):
    batch, settings = batches["soft"]
    found = []
    for recompute in (False, True):
        policy = Policy(make_decoder(num_hidden_layers=8), settings, torch.float32)
        policy.decoder.gradient_checkpointing = recompute

        def step(policy=policy):
            policy(batch).density.sum().backward()

        peak = peak_memory(step)
        found.append((peak, gradients(policy.decoder)))
    (peak, plain), (small_peak, recomputed) = found
    for name, gradient in plain.items():
        assert torch.equal(recomputed[name], gradient), name
    assert small_peak < peak / 2
