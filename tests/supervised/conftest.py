"""A tiny model on disk without weights: config.json and a tokenizer of whole words."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

WORDS = ["<unk>", "</s>", "->", *(f"n{i}" for i in range(20))]


@pytest.fixture(scope="session")
def hf_config():
    """hf_config(**changes): a transformers config."""

    def make(**changes):
        values = {
            "vocab_size": len(WORDS),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "bos_token_id": None,
            "eos_token_id": 1,
            "tie_word_embeddings": True,
            "initializer_range": 0.2,
        }
        return AutoConfig.for_model("llama", **{**values, **changes})

    return make


@pytest.fixture(scope="session")
def tokenizer():
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}->{% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="session")
def unwritten_model(tmp_path_factory, hf_config, tokenizer):
    """A directory that `model.path` takes with `model.from_scratch=true`."""
    path = tmp_path_factory.mktemp("model") / "unwritten"
    tokenizer.save_pretrained(path)
    hf_config(architectures=["LlamaForCausalLM"]).save_pretrained(path)
    return path
