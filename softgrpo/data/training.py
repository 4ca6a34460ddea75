"""The examples of a run, and which of them a step trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from softgrpo.config import Config
from softgrpo.data.examples import Example, load_examples
from softgrpo.data.prompts import Prompt, chat_text, encode_chats, filler_thoughts
from softgrpo.data.sources import DataError
from softgrpo.distributed import World

_AT_ONCE = 1024  # prompts that are encoded together


class TrainingData:
    """The training and held-out examples of a run.

    The constructor reads and checks both datasets; no model is needed for it. `prepare` then sets
    the tokenizer. By exact text, held-out questions are removed from training (`removed` counts
    them) and worked examples from both: their answers stand in the prompt. `too_long` counts what
    `data.drop_long_prompts` left out. Raises DataError, one line.
    """

    def __init__(self, config: Config) -> None:
        data = config.data
        self.config = config
        shown = {shot.prompt for shot in data.few_shot}
        held_out = load_examples(data.eval, data) if data.eval else []
        self.held_out = [e for e in held_out if e.text not in shown][: data.eval_size]
        if data.eval and not self.held_out:
            raise DataError(f"{data.eval}: every example is one of data.few_shot")
        examples = load_examples(data.train, data)
        known = shown | {example.text for example in self.held_out}
        self.train = [example for example in examples if example.text not in known]
        self.removed = len(examples) - len(self.train)
        if not self.train:
            raise DataError(f"{data.train}: every example is also held out in {data.eval}")
        self.too_long = 0
        self._tokenizer: Any = None
        self._filler: list[int] = []

    def prepare(self, tokenizer: Any, world: World | None = None) -> list[list[int]]:
        """Sets the tokenizer and checks every prompt of the run, so that none fails later.

        Each process of `world` encodes its share; all raise the error of any of them. Returns the
        prompts that ask most of an engine: the longest, and those with the largest id. Nothing else
        is kept: a prompt is encoded again when its round comes.
        """
        self._tokenizer, world = tokenizer, world or World()
        config, data = self.config, self.config.data
        self._filler = filler_thoughts(
            config.rollout.filler_thoughts, config.rollout.soft.end_of_thinking, tokenizer
        )
        wanted = range(len(self.train)) if data.drop_long_prompts else self._indices_of_run()
        parts = world.gather(self._check(data.train, self.train, world.share(wanted)))
        lengths = [length for part in parts for length in part.lengths]
        if self.held_out:
            parts.append(self._check(data.eval, self.held_out, range(len(self.held_out))))
        for part in parts:
            if part.error is not None:
                raise DataError(part.error)
        if data.drop_long_prompts:
            self._drop(lengths)
        return [ids for part in parts for ids in part.largest]

    def prompts_of_round(self, number: int, count: int) -> list[Prompt]:
        """The `count` prompts of a round, 0-based: a pure function of (run.seed, number, count).

        A step takes one round, and further ones where dynamic sampling refills it.
        """
        return self._encode(self.config.data.train, self.train, self._indices(number, count))

    def eval_prompts(self) -> list[Prompt]:
        """The prompts of the held-out examples, at most `data.eval_size`."""
        return self._encode(self.config.data.eval, self.held_out, range(len(self.held_out)))

    def _indices(self, number: int, count: int) -> list[int]:
        seed = self.config.run.seed if self.config.data.shuffle else None
        return round_indices(len(self.train), number, count, seed)

    def _indices_of_run(self) -> list[int]:
        """Of the training examples that some round takes, ascending."""
        config = self.config
        rounds = config.run.max_steps * (1 + config.algorithm.dynamic_sampling_rounds)
        count = config.rollout.prompts_per_step
        return sorted({index for number in range(rounds) for index in self._indices(number, count)})

    def _drop(self, lengths: list[int]) -> None:
        """Leaves out the training examples whose prompts are too long."""
        data, pairs = self.config.data, zip(self.train, lengths, strict=True)
        self.train = [example for example, length in pairs if length <= data.max_prompt_tokens]
        self.too_long = len(lengths) - len(self.train)
        if not self.train:
            raise DataError(
                f"{data.train}: every prompt is longer than data.max_prompt_tokens "
                f"({data.max_prompt_tokens})"
            )

    def _check(self, name: str | None, examples: list[Example], indices: Sequence[int]) -> _Checked:
        """Encodes some of the examples; the first that is wrong is an error."""
        data, checked = self.config.data, _Checked([], [], None)
        may_drop = data.drop_long_prompts and examples is self.train
        try:
            for start in range(0, len(indices), _AT_ONCE):
                some = indices[start : start + _AT_ONCE]
                prompts = self._encode(name, examples, some)
                for index, prompt in zip(some, prompts, strict=True):
                    checked.lengths.append(len(prompt.token_ids))
                    if len(prompt.token_ids) <= data.max_prompt_tokens:
                        checked.add(prompt.token_ids)
                    elif not may_drop:
                        raise DataError(
                            f"{name}, example {index}: the prompt has {len(prompt.token_ids)} "
                            f"tokens, data.max_prompt_tokens allows {data.max_prompt_tokens}"
                        )
        except DataError as error:
            checked.error = str(error)
        return checked

    def _encode(
        self, name: str | None, examples: list[Example], indices: Sequence[int]
    ) -> list[Prompt]:
        data, texts = self.config.data, []
        for index in indices:
            try:
                shots = (data.system_prompt, data.few_shot)
                texts.append(chat_text(examples[index], self._tokenizer, *shots))
            except DataError as error:
                raise DataError(f"{name}, example {index}: {error}") from None
        pairs = zip(indices, encode_chats(texts, self._tokenizer), strict=True)
        return [Prompt(examples[index], [*ids, *self._filler]) for index, ids in pairs]


@dataclass
class _Checked:
    """What a process found. lengths: tokens of its prompts. largest: the longest prompt and that
    with the largest id, of those that are not too long."""

    lengths: list[int]
    largest: list[list[int]]
    error: str | None

    def add(self, ids: list[int]) -> None:
        candidates = [*self.largest, ids]
        self.largest = [max(candidates, key=key) for key in (len, lambda ids: max(ids, default=-1))]


def round_indices(size: int, number: int, count: int, seed: int | None) -> list[int]:
    """Which examples the 0-based round takes, `count` of them; seed None keeps their order.

    Epoch e runs through the permutation drawn from (seed, e); a round may span several epochs.
    """
    positions = range(number * count, (number + 1) * count)
    orders: dict[int, np.ndarray] = {}
    for epoch in {position // size for position in positions}:
        orders[epoch] = (
            np.arange(size)
            if seed is None
            else np.random.default_rng([seed, epoch]).permutation(size)
        )
    return [int(orders[position // size][position % size]) for position in positions]
