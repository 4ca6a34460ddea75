"""What the runs read: a model without weights, its tokenizer, and the questions.

Everything is drawn from seeds, so that it is the same on every machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from graphs import END, FILL, HOPS, VOCABULARY, Graph, draw_graph
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

TAUGHT, ASKED, HELD_OUT = 60_000, 20_000, 512  # graphs: supervised, reinforced, tested
SEEDS = {"taught": 1, "asked": 2, "held_out": 3}
ID = {token: i for i, token in enumerate(VOCABULARY)}


def write_toy(folder: Path) -> None:
    """model/, {mixture,path,listing,filler}.jsonl, asked.jsonl and held_out.jsonl, once."""
    if (folder / "held_out.jsonl").exists():
        return
    write_model(folder / "model")
    taught = graphs("taught", TAUGHT)
    for start in ("mixture", "path", "listing", "filler"):
        _write(folder / f"{start}.jsonl", (lesson(graph, start) for graph in taught))
    for name, size in (("asked", ASKED), ("held_out", HELD_OUT)):
        rows = ({"prompt": g.prompt, "answer": g.answer} for g in graphs(name, size))
        _write(folder / f"{name}.jsonl", rows)


def graphs(name: str, size: int) -> list[Graph]:
    rng = np.random.default_rng(SEEDS[name])
    return [draw_graph(rng) for _ in range(size)]


def questions(name: str, size: int) -> list[tuple[list[int], int]]:
    """(prompt, answer) in ids."""
    return [([ID[t] for t in g.prompt.split()], ID[g.answer]) for g in graphs(name, size)]


def lesson(graph: Graph, start: str) -> dict[str, Any]:
    """A row for softgrpo-sft: the thoughts that a start is taught, then the answer."""
    prompt = [ID[token] for token in graph.prompt.split()]
    if start == "filler":
        target: list[Any] = [ID[FILL]] * HOPS
        mask = [0] * HOPS + [1]
        return {"prompt_ids": prompt, "target": [*target, ID[graph.answer]], "loss_mask": mask}
    if start == "mixture":
        target = [[[ID[name], 1.0] for name in frontier] for frontier in graph.frontiers]
    else:
        target = [ID[name] for name in (graph.path if start == "path" else graph.listing)]
    return {"prompt_ids": prompt, "target": [*target, ID[graph.answer]]}


def write_model(folder: Path) -> None:
    """A Llama of two layers and 0.2M parameters, and a tokenizer of whole words."""
    folder.mkdir(parents=True, exist_ok=True)
    words = Tokenizer(models.WordLevel(ID, unk_token=END))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, unk_token=END)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        eos_token_id=ID[END],
        bos_token_id=None,
        tie_word_embeddings=False,
        initializer_range=0.1,
    ).save_pretrained(folder)


def _write(path: Path, rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
