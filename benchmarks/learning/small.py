"""A small model from scratch for the hard sums: a run takes a minute where SmolLM2's takes an hour.

    python benchmarks/learning/experiment.py --grid 'small/*'

A Llama of four layers whose tokens are digits and signs. `softgrpo-sft` teaches it to write one
intermediate result and the answer, as `hard.yaml` shows SmolLM2, on sums of its own without the
operands that are held out; it stops where an answer is right now and then. The runs are those of
the hard task, from there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tasks import is_held_out
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

BOX, END = "\\boxed{", "<end>"
VOCABULARY = [*"0123456789+-=;", BOX, "}", END]
ID = {token: i for i, token in enumerate(VOCABULARY)}
TAUGHT, SEED = 90_000, 4  # sums; 1,400 steps of 64 see each once


def write_small(folder: Path) -> None:
    """model/ without weights, and taught.jsonl, once."""
    if (folder / "taught.jsonl").exists():
        return
    tokenizer = _write_model(folder / "model")
    with (folder / "taught.jsonl").open("w") as file:
        for expression, steps in sums():
            prompt, target = (
                tokenizer.encode(text, add_special_tokens=False) for text in (expression, steps)
            )
            row: dict[str, Any] = {"prompt_ids": prompt, "target": [*target, ID[END]]}
            file.write(json.dumps(row) + "\n")


def sums() -> Iterator[tuple[str, str]]:
    """Expressions of three numbers of one or two digits, and how they are added up."""
    rng = np.random.default_rng(SEED)
    for _ in range(TAUGHT):
        while True:
            a, b, c = (int(rng.integers(10 ** (d - 1), 10**d)) for d in rng.integers(1, 3, 3))
            first, second = rng.choice(["+", "-"], 2)
            if not is_held_out(f"{a} {b} {c}"):
                break
        part = a + b if first == "+" else a - b
        answer = part + c if second == "+" else part - c
        steps = f"={part};{part}{second}{c}={BOX}{answer}}}"
        yield f"{a}{first}{b}{second}{c}", steps


def _write_model(folder: Path) -> PreTrainedTokenizerFast:
    folder.mkdir(parents=True, exist_ok=True)
    signs = Tokenizer(models.WordLevel(ID, unk_token=END))
    signs.normalizer = normalizers.Replace(" ", "")
    signs.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|<end>|."), "isolated")
    signs.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=signs, eos_token=END, unk_token=END)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        eos_token_id=ID[END],
        bos_token_id=None,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    return tokenizer
