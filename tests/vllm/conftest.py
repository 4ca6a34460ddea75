"""A tiny random Llama in fp32 in our engine, in transformers, and in stock vLLM with the plug-in.

By `make test-vllm`, in an environment of its own. vLLM runs in this process, on the interpreter of
Triton.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # interpreter, replay; tiny_llama
if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch  # noqa: E402
from tiny_llama import EOS, VOCABULARY, tokenizer  # noqa: E402, F401
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the least that vLLM's attention of CPUs has
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "pad_token_id": 0,
    # Drift of one rounding from position to position stays small.
    "initializer_range": 0.08,
    "tie_word_embeddings": True,
}
OPTIONS = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 32,
    "max_model_len": 256,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 2**22,
    "max_logprobs": 64,
    "disable_log_stats": True,
    "additional_config": {"softgrpo": True},
}


def random_model(seed=0, **changes):
    torch.manual_seed(seed)
    config = LlamaConfig(**(CONFIG | changes))
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.fixture(scope="session")
def hf():
    return random_model()


@pytest.fixture(scope="session")
def model(tmp_path_factory, hf, tokenizer):  # noqa: F811
    """A directory."""
    path = tmp_path_factory.mktemp("model")
    hf.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def make(model):
    """make(...): vLLM on the model with these options."""
    from vllm import LLM

    kept = []  # the end of one would end the process group of all

    def make(**options):
        kept.append(LLM(str(model), **(OPTIONS | options)))
        return kept[-1]

    return make


@pytest.fixture(scope="session")
def vllm(make):
    return make()


@pytest.fixture(scope="session")
def ours(model):
    from softgrpo_engine import LLM

    return LLM(model, dtype="float32", max_model_len=256, max_batch_size=16, kv_memory=0.01)


@pytest.fixture(scope="session")
def prompts():
    """Lengths on both sides of the block of 32 tokens."""
    generator = torch.Generator().manual_seed(5)
    lengths = (5, 32, 33, 1, 70)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
