"""Samples as the choices of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from softgrpo.log.samples import Mixture, position_rows
from softgrpo.serve.protocol import Request
from softgrpo.serve.tokens import Offsets, TokenTexts
from softgrpo_engine import Output, Sample, SoftTokens

Choice = dict[str, Any]
# JSON has no infinity; vLLM writes this.
_NEVER = -9999.0


@dataclass(frozen=True)
class Position:
    """A token, its log p (None for the first of a prompt), and (token, value) of alternatives."""

    token: int
    logprob: float | None
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Answers:
    """Writes the choices of one request.

    thinking_end: the token after which the answer comes, where thinking is split off as
    reasoning_content, else None.
    """

    request: Request
    tokens: TokenTexts
    thinking_end: int | None

    def choice(self, index: int, output: Output, sample: Sample) -> Choice:
        """A whole sample."""
        reasoning, text = self.texts(sample)
        # The engine draws a token in any case; nobody asked for it.
        start = len(sample.token_ids) if self.request.max_tokens == 0 else 0
        end = {"finish_reason": sample.finish_reason, **self.extras(sample, start)}
        positions = sample_positions(sample, start)
        if self.request.is_chat:
            message = {"role": "assistant", "content": text}
            if reasoning is not None:
                message["reasoning_content"] = reasoning
            logprobs = self.logprobs(positions, Offsets(self.tokens, 0))
            return {"index": index, "message": message, "logprobs": logprobs, **end}
        text = "" if start else text
        prompt = self._prompt_text(output) if self.request.echo else ""
        logprobs = self.logprobs(positions, Offsets(self.tokens, len(prompt)))
        if self.request.echo and logprobs is not None:
            offsets = Offsets(self.tokens, 0, sent=prompt)
            of_prompt = self.logprobs(prompt_positions(output), offsets) or {}
            logprobs = {name: of_prompt[name] + logprobs[name] for name in logprobs}
        return {"index": index, "text": prompt + text, "logprobs": logprobs, **end}

    def texts(self, sample: Sample) -> tuple[str | None, str]:
        """(reasoning, answer); all is the answer where thinking is not split off."""
        if self.thinking_end is None:
            return None, sample.text
        ids = sample.token_ids
        if self.thinking_end not in ids:
            return sample.text, ""
        thoughts = ids[: ids.index(self.thinking_end)]
        # Of the text as it is: a stop string that cut it may have begun in the thoughts.
        length = len(self.tokens.decode(thoughts))
        reasoning, rest = sample.text[:length], sample.text[length:]
        return reasoning, rest.removeprefix(self.tokens.text(self.thinking_end)).lstrip("\n")

    def logprobs(self, positions: Sequence[Position], offsets: Offsets) -> dict[str, Any] | None:
        """Of positions, in the form of the route; None where they were not asked for."""
        count = self.request.logprobs
        if count is None:
            return None
        if self.request.is_chat:
            return {"content": [self._entry(p, p.top[:count]) for p in positions]}
        return {
            "tokens": [self._name(p.token) for p in positions],
            "token_logprobs": [_finite(p.logprob) for p in positions],
            "top_logprobs": [self._top(p, count) for p in positions],
            "text_offset": offsets.of([p.token for p in positions]),
        }

    def extras(self, sample: Sample, start: int) -> dict[str, Any]:
        """The record from position ``start`` on, in the forms that were asked for."""
        extras: dict[str, Any] = {}
        record = _from(sample.soft, start)
        if self.request.return_soft:
            extras["soft"] = record_as_lists(record)
        if self.request.return_positions:
            extras["positions"] = position_rows(record, self._mixture, self.tokens.tokenizer)
        return extras

    @property
    def _mixture(self) -> Mixture:
        soft = self.request.soft
        return (soft.tau, soft.weight_floor) if soft else (1.0, 0.0)

    def _prompt_text(self, output: Output) -> str:
        """As it was sent, where it was one text."""
        prompts = self.request.prompts
        if len(prompts) == 1 and isinstance(prompts[0], str):
            return prompts[0]
        return self.tokens.decode(output.prompt_token_ids)

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self.request.tokens_as_ids else self.tokens.text(token)

    def _entry(self, position: Position, top: list[tuple[int, float]]) -> dict[str, Any]:
        entry = self._value(position.token, position.logprob)
        return {**entry, "top_logprobs": [self._value(*alternative) for alternative in top]}

    def _value(self, token: int, value: float | None) -> dict[str, Any]:
        text = list(self.tokens.bytes(token))
        return {"token": self._name(token), "logprob": _finite(value), "bytes": text}

    def _top(self, position: Position, count: int) -> dict[str, float | None] | None:
        """As OpenAI does: also the token itself, where it is not among the most likely."""
        if position.logprob is None:
            return None
        found: dict[str, float | None] = {}
        for token, value in position.top[:count]:
            found.setdefault(self._name(token), _finite(value))  # two tokens can have one text
        found.setdefault(self._name(position.token), _finite(position.logprob))
        return found


def sample_positions(sample: Sample, start: int) -> list[Position]:
    """Generated positions from ``start`` on; the alternatives are the candidates, at their g'."""
    record = _from(sample.soft, start)
    rows = zip(record.ids.tolist(), record.gprime.tolist(), strict=True)
    return [
        Position(token, logprob, [pair for pair in zip(*row, strict=True) if pair[0] >= 0])
        for token, logprob, row in zip(
            sample.token_ids[start:], sample.logprobs[start:].tolist(), rows, strict=True
        )
    ]


def prompt_positions(output: Output) -> list[Position]:
    """The tokens of a prompt; without log-probabilities where those were not asked for."""
    first, *rest = output.prompt_token_ids
    scored = output.prompt_logprobs
    if scored is None:
        return [Position(token, None, []) for token in (first, *rest)]
    columns = (scored.logprobs.tolist(), scored.ids.tolist(), scored.top.tolist())
    return [Position(first, None, [])] + [
        Position(token, logprob, list(zip(ids, top, strict=True)))
        for token, logprob, ids, top in zip(rest, *columns, strict=True)
    ]


def record_as_lists(record: SoftTokens) -> dict[str, list[Any]]:
    """ids and gprime without the unused slots, kind, forced: a row a position."""
    used = [sum(token >= 0 for token in row) for row in record.ids.tolist()]
    rows = zip(record.ids.tolist(), record.gprime.tolist(), used, strict=True)
    pairs = [(ids[:n], [_finite(g) for g in gprime[:n]]) for ids, gprime, n in rows]
    return {
        "ids": [ids for ids, _ in pairs],
        "gprime": [gprime for _, gprime in pairs],
        "kind": record.kind.tolist(),
        "forced": record.forced.tolist(),
    }


def _from(record: SoftTokens, start: int) -> SoftTokens:
    return SoftTokens(
        record.ids[start:],
        record.gprime[start:],
        record.kind[start:],
        record.forced[start:],
        record.token[start:],
    )


def _finite(value: float | None) -> float | None:
    return None if value is None else max(value, _NEVER)
