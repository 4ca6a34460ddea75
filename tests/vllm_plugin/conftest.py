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
sys.path[:0] = [str(HERE), str(HERE.parent)]  # interpreter, tiny_model, records; tiny_llama
# Beside the simulated GPU vLLM would take this machine for one with CUDA.
HAS_VLLM = find_spec("vllm") is not None and "simulated_gpu" not in sys.modules
if HAS_VLLM:
    import interpreter  # noqa: F401

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch  # noqa: E402
from tiny_llama import VOCABULARY, tokenizer  # noqa: E402, F401
from tiny_model import OPTIONS, random_model  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def _engines_live():
    """The end of one would end the process group that all of them share here."""
    if HAS_VLLM:
        from vllm.v1.engine.core import EngineCore

        EngineCore.shutdown = lambda self, *rest, **options: None


def pytest_collection_modifyitems(items):
    if HAS_VLLM:
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs vLLM: make test-vllm"))


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

    return lambda **options: LLM(str(model), **(OPTIONS | options))


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
