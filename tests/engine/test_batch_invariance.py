"""With batch_invariant=True a sample has the same bits whatever it shares a batch with."""

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from softgrpo_engine import LLM, SamplingParams, SoftParams
from softgrpo_engine.model.config import DecoderConfig
from softgrpo_engine.model.decoder import Decoder
from softgrpo_engine.ops.extension import cpu_extension

if cpu_extension() is None:
    pytest.skip("no C++ extension", allow_module_level=True)

PARAMS = SamplingParams(max_tokens=24, ignore_eos=True, top_k=4)
SOFT = SoftParams(tau=0.8, end_of_thinking=2, max_soft_tokens=15)
SIZES = {
    "vocab_size": 97,
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.14,
}


def decoder_of(config_class, dtype):
    torch.manual_seed(1)
    decoder = Decoder(DecoderConfig.from_hf(config_class(**SIZES), ())).to(dtype)
    for parameter in decoder.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.14)
    return decoder.requires_grad_(False)


def run(decoder, prompts, uids, **options):
    options = {"max_batch_size": 16, "batch_invariant": True} | options
    llm = LLM(decoder, **options)
    return llm.generate_groups(prompts, PARAMS, SOFT, seed=3, uids=uids), llm.metrics()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rollouts_have_the_same_bits_in_every_batch(dtype):
    """Alone; together; in chunks of prompts beside decoding; preempted and computed again."""
    decoder = decoder_of(LlamaConfig, dtype)
    prompts = [list(range(3, 3 + n)) for n in (5, 16, 33, 40)]
    uids = [[10 * i, 10 * i + 1] for i in range(len(prompts))]
    alone = [
        run(decoder, [prompt], [[uid]], max_batch_size=1)[0][0].samples[0]
        for prompt, group in zip(prompts, uids, strict=True)
        for uid in group
    ]
    page_gib = 2 * 2 * 2 * 16 * 16 * dtype.itemsize / 2**30
    for options in (
        {},
        {"max_batch_tokens": 7},
        {"kv_memory": 6 * page_gib},
        {"max_batch_size": 3},
    ):
        outputs, metrics = run(decoder, prompts, uids, **options)
        assert (metrics["preemptions"] > 0) == ("kv_memory" in options)
        samples = [sample for output in outputs for sample in output.samples]
        for a, b in zip(alone, samples, strict=True):
            assert a.token_ids == b.token_ids
            assert torch.equal(a.soft.ids, b.soft.ids)
            assert torch.equal(a.soft.gprime, b.soft.gprime)
            assert torch.equal(a.logprobs, b.logprobs)


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_call_for_all_layers_is_one_call_for_each(config_class, dtype):
    """To the bit but for Qwen3, whose heads PyTorch normalises in the one and C++ in the other."""
    decoder = decoder_of(config_class, dtype)
    prompts, uids = [[5, 6, 7], list(range(3, 40))], [[0], [1]]
    together, _ = run(decoder, prompts, uids)
    assert decoder.packed.one_call is not None
    llm = LLM(decoder, max_batch_size=16, batch_invariant=True)
    decoder.packed.one_call = None
    each = llm.generate_groups(prompts, PARAMS, SOFT, seed=3, uids=uids)
    for a, b in zip(together, each, strict=True):
        if config_class is Qwen3Config:
            gap = 0.5 if dtype == torch.bfloat16 else 1e-4
            first = a.samples[0].soft.gprime[0], b.samples[0].soft.gprime[0]
            torch.testing.assert_close(*first, rtol=0, atol=gap)
        else:
            assert torch.equal(a.samples[0].soft.gprime, b.samples[0].soft.gprime)


def test_where_there_is_no_such_kernel_it_is_refused():
    decoder = decoder_of(LlamaConfig, torch.float64)
    with pytest.raises(ValueError, match=r"batch_invariant=True needs the C\+\+ kernels"):
        LLM(decoder, batch_invariant=True)
