"""Graphs as SmolLM2 reads them: a letter for a node, three tokens an edge; and what it is taught.

A lesson asks several questions about one graph, one after the other, so that most of what is read
is learnt from: thoughts and answers are trained, questions are not. The first question has the
place that it has in the tests.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from graphs import WIDTH, Graph, draw_graph
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from softgrpo_engine.model.source import resolve_model

FILLER = "_"
ASKED_PER_GRAPH = 8
SEEDS = {"taught": 11, "asked": 12, "held_out": 13}
# Each is a token of SmolLM2's, with the space before it.
LETTERS = [f" {letter}" for letter in string.ascii_uppercase + string.ascii_lowercase]


@dataclass(frozen=True)
class Question:
    """As of a Graph."""

    root: str
    answer: str
    asked: tuple[str, str]
    frontiers: list[list[str]]
    path: list[str]


def letter(name: str) -> str:
    return LETTERS[int(name[1:])]


def edges_text(graph: Graph) -> str:
    return "".join(f"{letter(a)}{letter(b)};" for a, b in (edge.split(">") for edge in graph.edges))


def question_text(question: Graph | Question) -> str:
    """Ends with the root: the first thought is one edge away."""
    return f" ?{''.join(map(letter, question.asked))} :{letter(question.root)}"


def more_questions(graph: Graph, hops: int, rng: np.random.Generator) -> Iterator[Question]:
    """About a graph that has been asked about, without end."""
    targets: dict[str, list[str]] = {}
    for edge in graph.edges:
        source, target = edge.split(">")
        targets.setdefault(source, []).append(target)
    # The first layer has so many edges before it ends.
    roots = [name for name in sorted(targets) if _depth(targets, name) == hops]
    # Of the last layer, with one that nobody points to where that was asked for.
    last = {name for names in targets.values() for name in names} - targets.keys()
    last |= {*graph.asked}
    while True:
        ways = [[str(rng.choice(roots))]]
        for _ in range(hops):
            ways = [[*way, name] for way in ways for name in targets[way[-1]]]
        frontiers = [sorted({way[hop] for way in ways}) for hop in range(1, hops + 1)]
        outside = sorted(last - set(frontiers[-1]))
        if not outside:
            continue
        answer = str(rng.choice(frontiers[-1]))
        other = str(rng.choice(outside))
        ways = [way for way in ways if way[-1] == answer]
        _, *path = ways[int(rng.integers(len(ways)))]
        asked = (answer, other) if rng.random() < 0.5 else (other, answer)
        yield Question(ways[0][0], answer, asked, frontiers, path)


def _depth(targets: dict[str, list[str]], name: str) -> int:
    return 1 + _depth(targets, targets[name][0]) if name in targets else 0


class Words:
    """The tokens of a task of so many hops."""

    def __init__(self, hops: int) -> None:
        if (hops + 1) * WIDTH > len(LETTERS):
            raise ValueError(
                f"{hops} hops: {len(LETTERS)} letters name {len(LETTERS) // WIDTH - 1}"
            )
        self.hops = hops
        self._tokenizer = AutoTokenizer.from_pretrained(str(resolve_model("smollm2-135m")))
        self._id = {text: self._only_id(text) for text in (*LETTERS, FILLER)}

    @property
    def filler(self) -> int:
        return self._id[FILLER]

    def graphs(self, name: str, size: int) -> Iterator[Graph]:
        rng = np.random.default_rng([SEEDS[name], self.hops])
        return (draw_graph(rng, self.hops) for _ in range(size))

    def ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def prompt(self, graph: Graph) -> str:
        return edges_text(graph) + question_text(graph)

    def questions(self, name: str, size: int) -> list[tuple[list[int], int]]:
        """(prompt, answer) in ids."""
        found = self.graphs(name, size)
        return [(self.ids(self.prompt(g)), self._id[letter(g.answer)]) for g in found]

    def lesson(self, graph: Graph, start: str, rng: np.random.Generator) -> dict[str, Any]:
        """A row for softgrpo-sft: the first question, and others after it."""
        target, mask = self._answered(graph, start)
        others = more_questions(graph, self.hops, rng)
        for _ in range(ASKED_PER_GRAPH - 1):
            question = next(others)
            asked = self.ids(f";{question_text(question)}")
            tokens, trained = self._answered(question, start)
            target += [*asked, *tokens]
            mask += [*[0] * len(asked), *trained]
        return {"prompt_ids": self.ids(self.prompt(graph)), "target": target, "loss_mask": mask}

    def _answered(self, question: Graph | Question, start: str) -> tuple[list[Any], list[int]]:
        """Thoughts and answer, and which of them are trained."""
        thoughts: Sequence[Any]
        if start == "filler":
            thoughts = [self.filler] * self.hops
        elif start == "mixture":
            thoughts = [[[self._id[letter(n)], 1.0] for n in f] for f in question.frontiers]
        else:
            thoughts = [self._id[letter(name)] for name in question.path]
        answer = self._id[letter(question.answer)]
        return [*thoughts, answer], [int(start != "filler")] * self.hops + [1]

    def _only_id(self, text: str) -> int:
        (found,) = self.ids(text)
        return found


def write_words(folder: Path, words: Words, taught: int, asked: int) -> None:
    """{mixture,path,filler}.jsonl and asked.jsonl, once."""
    if (folder / "asked.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for start in ("mixture", "path", "filler"):
        rng = np.random.default_rng([SEEDS["taught"], words.hops, 1])
        rows = (words.lesson(graph, start, rng) for graph in words.graphs("taught", taught))
        _write(folder / f"{start}.jsonl", rows)
    found = words.graphs("asked", asked)
    _write(
        folder / "asked.jsonl",
        ({"prompt": words.prompt(g), "answer": letter(g.answer)} for g in found),
    )


def _write(path: Path, rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_cut_model(folder: Path, layers: int | None) -> None:
    """SmolLM2, or its first layers, embeddings and last norm; a prompt is the text itself."""
    if (folder / "model.safetensors").exists():
        return
    source = resolve_model("smollm2-135m")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(str(source))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    config = json.loads((source / "config.json").read_text())
    layers = layers or config["num_hidden_layers"]
    config["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(source.glob("*.safetensors")):
        weights |= load_file(path)
    kept = {name: weight for name, weight in weights.items() if _layer(name) < layers}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def _layer(name: str) -> int:
    """Of a parameter; -1 for those of no layer."""
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else -1
