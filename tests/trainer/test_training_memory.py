"""Memory of a training step: nothing of tokens x vocabulary, and layers that are computed again."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from softgrpo.batch import RolloutBatch
from softgrpo.config import AlgorithmConfig, OptimConfig
from softgrpo.density import DensitySettings
from softgrpo.policy import Policy
from softgrpo.update import Update
from softgrpo_engine import LLM, SamplingParams, SoftParams
from softgrpo_engine.config import DecoderConfig
from softgrpo_engine.model import Decoder

HIDDEN = 16
GROUPS, SAMPLES, LENGTH = 3, 8, 16
SOFT = SoftParams(top_k=5, end_of_thinking=None)
MODES = {
    "soft": (SOFT, SamplingParams(max_tokens=LENGTH, ignore_eos=True), DensitySettings()),
    "discrete": (
        False,
        SamplingParams(max_tokens=LENGTH, ignore_eos=True, top_k=6),
        DensitySettings(soft_enabled=False),
    ),
    "vocabulary": (
        False,
        SamplingParams(max_tokens=LENGTH, ignore_eos=True, top_k=-1, top_p=1.0),
        DensitySettings(soft_enabled=False, discrete_full=True, discrete_listed=False),
    ),
}


def make_decoder(vocab, layers=2):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=vocab,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    decoder = Decoder(DecoderConfig.from_hf(config))
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return decoder


def rollout(mode, vocab):
    soft, params, _ = MODES[mode]
    engine = LLM(make_decoder(vocab), kv_memory=0.01, max_batch_size=GROUPS * SAMPLES)
    uids = [[SAMPLES * g + s for s in range(SAMPLES)] for g in range(GROUPS)]
    prompts = [[5, 6, 7, 8 + g] for g in range(GROUPS)]
    outputs = engine.generate_groups(prompts, params, soft, seed=3, uids=uids)
    return RolloutBatch.from_outputs(outputs, seed=3, stream=0, weight_version=0)


class Shapes(TorchDispatchMode):
    """Shapes of everything that operators return."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tuple(tensor.shape))
        return out


def step(mode, batch, vocab, checkpointing=False):
    """The gradients of one update."""
    decoder = make_decoder(vocab)
    decoder.gradient_checkpointing = checkpointing
    policy = Policy(decoder, MODES[mode][2], torch.float32)
    update = Update(policy, None, AlgorithmConfig(), OptimConfig(grad_clip=1e9), LENGTH)
    advantages = torch.linspace(-1, 1, GROUPS * SAMPLES)
    update(batch, advantages, lr=1e-3)
    return {name: parameter.grad for name, parameter in decoder.named_parameters()}


@pytest.mark.parametrize("mode", MODES)
def test_no_tensor_of_tokens_by_vocabulary(mode, monkeypatch):
    """Nothing is larger than the embeddings and the least slice of 256 tokens of the vocabulary."""
    slice_size = 2**16
    monkeypatch.setattr("softgrpo_kernels.token_logprob._CHUNK_ELEMENTS", slice_size)
    vocab, tokens = 4001, GROUPS * SAMPLES * LENGTH
    assert tokens * vocab > 20 * slice_size
    batch = rollout(mode, vocab)
    with Shapes() as shapes:
        step(mode, batch, vocab)
    sizes = {torch.Size(shape).numel() for shape in shapes.seen}
    assert max(sizes) == max(vocab * HIDDEN, 256 * tokens if mode == "vocabulary" else 0)


@pytest.mark.parametrize("mode", MODES)
def test_checkpointed_layers_give_the_same_gradients_bit_for_bit(mode):
    batch = rollout(mode, 61)
    plain, checkpointed = (step(mode, batch, 61, flag) for flag in (False, True))
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[name]), name


def test_checkpointed_layers_keep_less():
    batch = rollout("soft", 61)
    kept = []
    for checkpointing in (False, True):
        decoder = make_decoder(61, layers=6)
        decoder.gradient_checkpointing = checkpointing
        policy = Policy(decoder, MODES["soft"][2], torch.float32)
        sizes = {}

        def keep(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            policy(batch).density.sum()
        kept.append(sum(sizes.values()))
    assert kept[1] < 0.4 * kept[0]
