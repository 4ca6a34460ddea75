"""What a stream has not said yet of a sample."""

from __future__ import annotations

from collections.abc import Sequence

from softgrpo.serve.answers import Answers, Choice, sample_positions
from softgrpo.serve.tokens import Offsets
from softgrpo_engine import Sample


class Deltas:
    """The choices of a stream that tell one sample, piece by piece."""

    def __init__(self, answers: Answers, index: int) -> None:
        self._answers, self._index = answers, index
        self._stop = answers.request.params.stop
        self._reasoning = self._text = self._positions = 0
        self._offsets = Offsets(answers.tokens, 0)
        self._begun = False

    def next(self, sample: Sample) -> Choice | None:
        """What is new in the sample so far; None when that is nothing to be told yet."""
        ended = sample.finish_reason is not None
        reasoning, text = self._answers.texts(sample)
        if not ended:
            reasoning = reasoning and reasoning[: _settled(reasoning, self._stop)]
            text = text[: _settled(text, self._stop)]
        told, thought = text[self._text :], (reasoning or "")[self._reasoning :]
        self._text += len(told)
        self._reasoning += len(thought)
        rest = self._rest(sample)
        if not (ended or told or thought or any(rest.values())):
            return None
        end = {"finish_reason": sample.finish_reason, **rest}
        if not self._answers.request.is_chat:
            return {"index": self._index, "text": told, **end}
        delta = {} if self._begun else {"role": "assistant"}
        self._begun = True
        if told or not thought:
            delta["content"] = told
        if thought:
            delta["reasoning_content"] = thought
        return {"index": self._index, "delta": delta, **end}

    def _rest(self, sample: Sample) -> Choice:
        """Log-probabilities and record of the new positions."""
        start, self._positions = self._positions, len(sample.token_ids)
        answers = self._answers
        positions = []
        if answers.request.logprobs is not None:
            positions = sample_positions(sample, start)
        logprobs = answers.logprobs(positions, self._offsets)
        extras = answers.extras(sample, start)
        return {"logprobs": logprobs, **extras}


def _settled(text: str, stop: Sequence[str]) -> int:
    """How much of an unfinished text can stand: a character whose bytes are not all there shows as
    U+FFFD, and what may be the begin of a stop string would be cut."""
    end = len(text.rstrip("\ufffd"))
    held = (
        length
        for string in stop
        for length in range(1, min(len(string), end + 1))
        if text.startswith(string[:length], end - length)
    )
    return end - max(held, default=0)
