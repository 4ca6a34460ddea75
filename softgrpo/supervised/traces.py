"""Rows of a dataset as traces: a prompt, and a target whose positions are tokens or mixtures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softgrpo.config.supervised import SupervisedDataConfig
from softgrpo.data.examples import Example, checked_prompt
from softgrpo.data.prompts import build_prompt
from softgrpo.data.sources import DataError
from softgrpo_engine.model.config import DecoderConfig
from softgrpo_engine.params import K_MAX


@dataclass(frozen=True)
class Trace:
    """A prompt of n tokens and a target of m positions, each a distribution over 1 to K tokens.

    prompt_ids: int32 [n]. ids: int32 [m, K], the heaviest token first, unused slots -1. weights:
    float32 [m, K], the sum of a position is 1; 0 in unused slots. trained: bool [m], whether a
    position is predicted, or only read by those after it.
    """

    prompt_ids: Tensor
    ids: Tensor
    weights: Tensor
    trained: Tensor

    def __len__(self) -> int:
        """Tokens and mixtures that are read: the last position is predicted alone."""
        return len(self.prompt_ids) + len(self.ids) - 1


def load_traces(
    rows: Iterable[Mapping[str, Any]],
    source: str,
    data: SupervisedDataConfig,
    tokenizer: Any,
    model: DecoderConfig,
) -> list[Trace]:
    """The rows of a dataset in their order. Raises DataError, one line with the row and the
    remedy; `source` is the name of the dataset there."""
    reader = _Reader(data, tokenizer, model)
    traces = []
    for number, row in enumerate(rows):
        try:
            traces.append(reader.trace(row))
        except DataError as error:
            raise DataError(f"{source}, row {number}: {error}") from None
    if not traces:
        raise DataError(f"{source}: the dataset is empty")
    return traces


class _Reader:
    def __init__(self, data: SupervisedDataConfig, tokenizer: Any, model: DecoderConfig) -> None:
        self.data, self.tokenizer, self.model = data, tokenizer, model
        self._id_of_text: dict[str, int] = {}

    def trace(self, row: Mapping[str, Any]) -> Trace:
        prompt = self._prompt(row)
        target = self._target(row)
        total = len(prompt) + len(target)
        for limit, name in (
            (self.data.max_tokens, "data.max_tokens"),
            (self.model.max_position_embeddings, "the model's context"),
        ):
            if total > limit:
                raise DataError(f"prompt and target have {total} tokens, {name} is {limit}")
        slots = max(map(len, target))
        return Trace(
            torch.tensor(prompt, dtype=torch.int32),
            torch.tensor([[*p, *[-1] * (slots - len(p))] for p in target], dtype=torch.int32),
            torch.tensor([[*p.values(), *[0.0] * (slots - len(p))] for p in target]),
            _trained(row.get("loss_mask"), len(target)),
        )

    def _prompt(self, row: Mapping[str, Any]) -> list[int]:
        given = [key for key in ("prompt", "prompt_ids") if row.get(key) is not None]
        if len(given) != 1:
            raise DataError(f"needs prompt or prompt_ids, one of them; columns: {', '.join(row)}")
        prompt = row[given[0]]
        if given == ["prompt"]:
            example = Example(checked_prompt(prompt, "prompt"), "", {})
            prompt = build_prompt(
                example, self.tokenizer, self.data.system_prompt, self.data.few_shot
            )
        elif not isinstance(prompt, list) or not prompt or not all(map(_is_integer, prompt)):
            raise DataError(f"prompt_ids must be a list of token ids, got {_short(prompt)}")
        return [self._checked_id(token) for token in prompt]

    def _target(self, row: Mapping[str, Any]) -> list[dict[int, float]]:
        """Of each position {token id: weight}, the heaviest first."""
        target = row.get("target")
        if isinstance(target, str):
            ids = self.tokenizer.encode(target, add_special_tokens=False)
            return [{self._checked_id(token): 1.0} for token in [*ids, self._end()]]
        if not isinstance(target, list) or not target:
            raise DataError(f"target must be text or a list of positions, got {_short(target)}")
        positions = []
        for i, position in enumerate(target):
            try:
                positions.append(self._distribution(position))
            except DataError as error:
                raise DataError(f"target[{i}]: {error}") from None
        return positions

    def _distribution(self, position: Any) -> dict[int, float]:
        if isinstance(position, Mapping):
            pairs: Sequence[Any] = list(position.items())
        elif isinstance(position, list):
            pairs = position
        else:
            return {self._token_id(position): 1.0}
        if not 1 <= len(pairs) <= K_MAX:
            raise DataError(f"a mixture has 1 to {K_MAX} tokens, this one {len(pairs)}")
        weights: dict[int, float] = {}
        for pair in pairs:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise DataError(f"a mixture is {{token: weight}} or [[token, weight], ...]: {pair}")
            token, weight = self._token_id(pair[0]), pair[1]
            is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not is_number or not (math.isfinite(weight) and weight > 0):
                raise DataError(f"the weight of {pair[0]!r} must be > 0 and finite, got {weight!r}")
            if token in weights:
                raise DataError(f"{pair[0]!r} (token {token}) stands there twice")
            weights[token] = float(weight)
        largest = max(weights.values())  # divided by first, so that the sum does not overflow
        total = sum(weight / largest for weight in weights.values())
        heaviest = sorted(weights, key=lambda token: -weights[token])
        return {token: weights[token] / largest / total for token in heaviest}

    def _token_id(self, token: Any) -> int:
        """Of an id, or of a text that is one token."""
        if _is_integer(token):
            return self._checked_id(token)
        if not isinstance(token, str):
            raise DataError(f"a token is a text or an id, got {_short(token)}")
        if token not in self._id_of_text:
            ids = self.tokenizer.encode(token, add_special_tokens=False)
            unknown = self.tokenizer.unk_token_id
            if len(ids) != 1 or (ids == [unknown] and token != self.tokenizer.unk_token):
                found = "not in the vocabulary" if unknown in ids else f"{len(ids)} tokens"
                raise DataError(f"{token!r} is {found}, a position takes exactly one")
            self._id_of_text[token] = self._checked_id(ids[0])
        return self._id_of_text[token]

    def _checked_id(self, token: int) -> int:
        if not 0 <= token < self.model.vocab_size:
            raise DataError(f"token {token}: the model has 0 .. {self.model.vocab_size - 1}")
        return token

    def _end(self) -> int:
        """What ends a text: it must be what generation stops at."""
        end = self.tokenizer.eos_token_id
        if end is None or end not in self.model.eos_token_ids:
            raise DataError(
                f"a text target ends with the tokenizer's end of sequence ({end}), but the model's "
                f"eos_token_id is {list(self.model.eos_token_ids)}: make them agree, or give the "
                "target as a list of tokens"
            )
        return end


def _trained(mask: Any, positions: int) -> Tensor:
    if mask is None:
        return torch.ones(positions, dtype=torch.bool)
    if not isinstance(mask, list) or len(mask) != positions or any(m not in (0, 1) for m in mask):
        raise DataError(
            f"loss_mask must be a list of 0 and 1, one for each of the {positions} positions of "
            f"the target, got {_short(mask)}"
        )
    if not any(mask):
        raise DataError("loss_mask leaves nothing to learn: set at least one position to 1")
    return torch.tensor(mask, dtype=torch.bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
