"""The engine on a GPU: parity, graphs, preemption, what a decode step waits for."""

import copy

import pytest
import torch

from softgrpo_engine import LLM, SamplingParams, SoftParams
from softgrpo_engine.config import DecoderConfig
from softgrpo_engine.model import Decoder
from softgrpo_engine.weights import load_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SOFT = SoftParams(top_k=4, tau=0.7, end_of_thinking=2, max_soft_tokens=9)


@pytest.fixture
def make_gpu_llm(hf_model, tokenizer):
    def make(pages=None, **options):
        decoder = Decoder(DecoderConfig.from_hf(hf_model.config))
        load_weights(decoder, iter(copy.deepcopy(hf_model.state_dict()).items()))
        if pages is not None:
            options["kv_memory"] = pages * (2 * 2 * 2 * 16 * 8 * 4) / 2**30
        options = {"max_batch_size": 16, "max_batch_tokens": 256, "max_model_len": 256} | options
        return LLM(decoder.to("cuda"), tokenizer=tokenizer, **options)

    return make


def sampled(llm, prompts):
    params = SamplingParams(n=3, max_tokens=24, min_tokens=5, seed=4)
    outputs = llm.generate(prompts, params, SOFT, progress=False)
    return [sample for output in outputs for sample in output.samples]


def assert_close(samples, expected):
    for a, b in zip(samples, expected, strict=True):
        assert a.token_ids == b.token_ids
        torch.testing.assert_close(a.soft.gprime, b.soft.gprime, rtol=1e-3, atol=1e-3)


def test_greedy_equals_transformers(make_gpu_llm, hf_model, prompts):
    outputs = make_gpu_llm().generate(prompts, GREEDY, soft=False, progress=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = hf_model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=24, min_new_tokens=24,
            eos_token_id=None,
        )[0, len(prompt) :]  # fmt: skip
        assert output.samples[0].token_ids == expected.tolist()


def test_the_cpu_draws_the_same(make_gpu_llm, make_llm, prompts):
    assert_close(sampled(make_gpu_llm(), prompts), sampled(make_llm(), prompts))


def test_graphs_give_what_eager_steps_give(make_gpu_llm, prompts):
    eager, graphed = make_gpu_llm(), make_gpu_llm()
    eager.runner.graphs = None
    assert_close(sampled(graphed, prompts), sampled(eager, prompts))
    assert len(graphed.runner.graphs) > 1
    recorded = len(graphed.runner.graphs)
    sampled(graphed, prompts)
    assert len(graphed.runner.graphs) == recorded


def test_graphs_see_updated_weights(make_gpu_llm, hf_model, prompts):
    state = {name: 1.05 * x for name, x in hf_model.state_dict().items()}
    updated, fresh = make_gpu_llm(), make_gpu_llm()
    sampled(updated, prompts)
    recorded = dict(updated.runner.graphs._graphs)
    updated.update_weights(state.items(), 1)
    fresh.update_weights(state.items(), 1)
    assert_close(sampled(updated, prompts), sampled(fresh, prompts))
    # In place: what was recorded is still in use.
    assert recorded.items() <= updated.runner.graphs._graphs.items()


def test_preemption_changes_nothing(make_gpu_llm, prompts):
    tight = make_gpu_llm(pages=9)
    assert_close(sampled(tight, prompts), sampled(make_gpu_llm(), prompts))
    assert tight.metrics()["preemptions"] > 0


def test_a_decode_step_waits_for_nothing(make_gpu_llm, prompts):
    """From planned to launched: PyTorch raises where something would synchronise."""
    llm = make_gpu_llm()
    call = llm.submit(prompts, GREEDY, soft=False)
    for _ in range(4):
        llm.step()
    plan = llm.scheduler.schedule()
    assert plan.is_decode
    torch.cuda.set_sync_debug_mode("error")
    try:
        launched = llm.runner.launch(plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(launched.read().valid)
    llm.scheduler.commit(plan)
    llm.release(call)


@pytest.mark.parametrize("attention", ["flashinfer", "varlen"])
def test_other_back_ends_draw_the_same(hf_model, prompts, attention):
    if attention == "flashinfer":
        pytest.importorskip("flashinfer")
    elif torch.nn.attention.current_flash_attention_impl() != "FA3":
        pytest.skip("FlashAttention 3 is not active")
    config = copy.deepcopy(hf_model.config)
    config.head_dim = 64  # theirs takes no 8
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig.from_hf(config)).to("cuda", torch.bfloat16)
    for parameter in decoder.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.14)
    first = []
    for name in ("kernels", attention):
        llm = LLM(decoder, attention=name, max_model_len=256, max_batch_size=16)
        outputs = llm.generate(prompts, GREEDY, soft=False, progress=False)
        first.append(torch.stack([o.samples[0].logprobs[0] for o in outputs]))
    torch.testing.assert_close(*first, rtol=0, atol=0.1)
