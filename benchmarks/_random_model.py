"""A checkpoint of a model's shape with random weights, and data for it: no download."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models
from tokenizers.decoders import Fuse
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

# Wider than the other weights, so that a few tokens of the vocabulary stand out.
HEAD, OTHERS = 0.08, 0.02


def write_random_model(config: PretrainedConfig, folder: Path) -> None:
    """A directory as the hub has it: bfloat16 weights, and a tokenizer of single characters.

    An answer hardly ever ends before its limit: of some hundred thousand tokens one is its end.
    """
    config.bos_token_id, config.eos_token_id = 0, 1
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    torch.manual_seed(0)
    weights = {
        name: torch.ones(p.shape, dtype=torch.bfloat16)
        if "norm" in name
        else torch.empty(p.shape).normal_(std=HEAD if "lm_head" in name else OTHERS).bfloat16()
        for name, p in model.named_parameters()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    _tokenizer(config.vocab_size).save_pretrained(folder)


def write_questions(folder: Path, count: int, length: int) -> Path:
    """jsonl with the columns `problem` and `answer`, of about so many characters, each a token."""
    path = folder / "questions.jsonl"
    rows = [{"problem": f"question {i} ".ljust(length, "x"), "answer": ""} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    words = ["<s>", "</s>", "</think>", "\n", *map(chr, range(32, 127))]
    words += [f"w{i}" for i in range(vocabulary - len(words))]
    ids = {word: i for i, word in enumerate(words[:vocabulary])}
    inner = Tokenizer(models.WordLevel(ids, unk_token="<s>"))
    inner.pre_tokenizer = Split(Regex(r"</?\w+>|[\s\S]"), "isolated")
    inner.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<s>"
    )
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] }}\n{% endfor %}"
    return tokenizer
