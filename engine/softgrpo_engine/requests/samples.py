"""What a sample has come to: its text, and the strings that end it."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from softgrpo_engine.outputs import FinishReason, PromptLogprobs, Sample
from softgrpo_engine.scheduling.sequence import Sequence
from softgrpo_engine.soft_tokens import SoftTokens


def finish_reason(sequence: Sequence, tokenizer: Any) -> FinishReason | None:
    """Why its newest token ends the sample; None while it goes on."""
    if sequence.tokens[-1] in sequence.end_ids or _hits_stop_string(sequence, tokenizer):
        return "stop"
    return "length" if len(sequence.tokens) == sequence.params.max_tokens else None


def _hits_stop_string(sequence: Sequence, tokenizer: Any) -> bool:
    """Whether the newest token completes one of the sample's stop strings."""
    stop = sequence.params.stop
    if not stop or len(sequence.tokens) < sequence.min_tokens:
        return False
    # A hit ends in the newest token, and a character has at most four tokens (its bytes): however
    # long the sample is, its tail is enough.
    tail = sequence.tokens[-4 * max(map(len, stop)) - 4 :]
    text = tokenizer.decode(tail, skip_special_tokens=True)
    return _stop_index(text, tail, stop, tokenizer) is not None


def as_sample(
    sequence: Sequence,
    soft: SoftTokens,
    logprobs: Tensor,
    kept_mass: Tensor | None,
    tokenizer: Any,
) -> Sample:
    """The sample so far, with its record."""
    return Sample(
        text=_text(sequence, tokenizer),
        token_ids=list(sequence.tokens),
        logprobs=logprobs,
        soft=soft,
        finish_reason=sequence.finish_reason,
        uid=sequence.uid,
        group=sequence.group,
        kept_mass=kept_mass,
    )


def prompt_logprobs(sequence: Sequence) -> PromptLogprobs | None:
    """Those of its prompt, on the host; None where they were not asked for."""
    top = sequence.params.prompt_logprobs
    if not sequence.scores_prompt or top is None:
        return None
    none = torch.empty(0, top)  # a prompt of one token
    parts = [PromptLogprobs(torch.empty(0), none.int(), none)]
    parts += sequence.prompt_parts
    return PromptLogprobs(
        torch.cat([part.logprobs.cpu() for part in parts]),
        torch.cat([part.ids.cpu() for part in parts]),
        torch.cat([part.top.cpu() for part in parts]),
    )


def _text(sequence: Sequence, tokenizer: Any) -> str:
    """The text generated so far, cut before a stop string that ended it; empty without a
    tokenizer."""
    if tokenizer is None:
        return ""
    text: str = tokenizer.decode(sequence.tokens, skip_special_tokens=True)
    if sequence.finish_reason != "stop":
        return text
    return text[: _stop_index(text, sequence.tokens, sequence.params.stop, tokenizer)]


def _stop_index(text: str, tokens: list[int], stop: Seq[str], tokenizer: Any) -> int | None:
    """Where the first of the stop strings that end in the newest token starts in the text.

    One that ended before was seen before `min_tokens`, and counts no more.
    """
    if not any(string in text for string in stop):
        return None
    before = tokenizer.decode(tokens[:-1], skip_special_tokens=True)
    # Not its length: the newest token may complete a character that was a replacement there.
    old = sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, text, strict=False))
    )
    starts = [text.find(string, max(0, old - len(string) + 1)) for string in stop]
    return min((start for start in starts if start >= 0), default=None)
