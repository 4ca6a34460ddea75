"""A tiny random Llama in fp32, its transformers twin, and engines around it."""

import copy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, models
from tokenizers.decoders import Fuse
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from softgrpo_engine import LLM
from softgrpo_engine.model.config import DecoderConfig
from softgrpo_engine.model.decoder import Decoder
from softgrpo_engine.model.weights import load_weights

sys.path.insert(0, str(Path(__file__).parent))  # families

EOS, THINK_END, VOCABULARY = 1, 2, 97


@pytest.fixture(scope="session")
def hf_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=EOS,
        pad_token_id=0,
        # Wide enough that the next token hangs on the whole history and no greedy choice is a tie.
        initializer_range=0.14,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.fixture(scope="session")
def tokenizer():
    """Two-letter tokens "aa", "ab", ...; id 1 is the end, id 2 is </think>."""
    words = ["<s>", "</s>", "</think>"]
    words += [chr(97 + i // 26) + chr(97 + i % 26) for i in range(VOCABULARY - len(words))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    inner.pre_tokenizer = Split(Regex(r"</?\w+>|\w\w"), "isolated")
    inner.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory, hf_model, tokenizer):
    """A directory that `LLM` and the commands take."""
    path = tmp_path_factory.mktemp("model")
    hf_model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def make_llm_on(hf_model, tokenizer):
    """make_llm_on(device, ...): an engine of its own weights; keyword arguments go to LLM, `pages`
    sets the KV cache."""

    def make(device, pages=None, **options):
        decoder = Decoder(DecoderConfig.from_hf(hf_model.config))
        load_weights(decoder, iter(copy.deepcopy(hf_model.state_dict()).items()))
        if pages is not None:
            # 2 layers, k and v, 2 heads, 16 slots, 8 wide, 4 bytes
            options["kv_memory"] = pages * (2 * 2 * 2 * 16 * 8 * 4) / 2**30
        options = {"max_batch_size": 16, "max_batch_tokens": 256, "max_model_len": 256} | options
        return LLM(decoder.to(device), tokenizer=tokenizer, **options)

    return make


@pytest.fixture
def make_llm(make_llm_on, device):
    """make_llm(...): such an engine on the CPU, and on a GPU."""
    return partial(make_llm_on, device)


@pytest.fixture(scope="session")
def prompts():
    """Lengths on both sides of the 16-token page, and one of several pages."""
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()
        for n in (5, 16, 17, 40, 1, 33)
    ]
