"""The examples of a run, and which of them a step trains on."""

from __future__ import annotations

from typing import Any

import numpy as np

from softgrpo.config import Config
from softgrpo.data.examples import Example, load_examples
from softgrpo.data.prompts import Prompt, build_prompt, filler_thoughts
from softgrpo.data.sources import DataError


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

    def prepare(self, tokenizer: Any) -> list[Prompt]:
        """Sets the tokenizer and returns every prompt of the run, so that none fails later."""
        self._tokenizer = tokenizer
        config = self.config
        rollout = config.rollout
        self._filler = filler_thoughts(
            rollout.filler_thoughts, rollout.soft.end_of_thinking, tokenizer
        )
        if config.data.drop_long_prompts:
            self._drop_long_prompts()
        rounds = range(config.run.max_steps * (1 + config.algorithm.dynamic_sampling_rounds))
        count = config.rollout.prompts_per_step
        indices = sorted({index for number in rounds for index in self._indices(number, count)})
        name = self.config.data.train
        train = [self._encode(self.train[i], f"{name}, example {i}") for i in indices]
        return train + self.eval_prompts()

    def prompts_of_round(self, number: int, count: int) -> list[Prompt]:
        """The `count` prompts of a round, 0-based: a pure function of (run.seed, number, count).

        A step takes one round, and further ones where dynamic sampling refills it.
        """
        name = self.config.data.train
        return [
            self._encode(self.train[index], f"{name}, example {index}")
            for index in self._indices(number, count)
        ]

    def eval_prompts(self) -> list[Prompt]:
        """The prompts of the held-out examples, at most `data.eval_size`."""
        return [
            self._encode(example, f"{self.config.data.eval}, example {index}")
            for index, example in enumerate(self.held_out)
        ]

    def _indices(self, number: int, count: int) -> list[int]:
        seed = self.config.run.seed if self.config.data.shuffle else None
        return round_indices(len(self.train), number, count, seed)

    def _drop_long_prompts(self) -> None:
        data, before = self.config.data, len(self.train)
        self.train = [
            example for example in self.train if len(self._ids(example)) <= data.max_prompt_tokens
        ]
        self.too_long = before - len(self.train)
        if not self.train:
            raise DataError(
                f"{data.train}: every prompt is longer than data.max_prompt_tokens "
                f"({data.max_prompt_tokens})"
            )

    def _encode(self, example: Example, where: str) -> Prompt:
        data = self.config.data
        try:
            ids = self._ids(example)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        if len(ids) > data.max_prompt_tokens:
            raise DataError(
                f"{where}: the prompt has {len(ids)} tokens, data.max_prompt_tokens allows "
                f"{data.max_prompt_tokens}"
            )
        return Prompt(example, ids)

    def _ids(self, example: Example) -> list[int]:
        data = self.config.data
        shots = (self._tokenizer, data.system_prompt, data.few_shot)
        return build_prompt(example, *shots, self._filler)


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
