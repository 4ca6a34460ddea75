"""A tiny random Llama in fp32 of transformers, and its tokenizer."""

import pytest
import torch
from tokenizers import Regex, Tokenizer, models
from tokenizers.decoders import Fuse
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

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
