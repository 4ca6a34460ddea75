"""Text of a sample, and the strings that end it."""

from __future__ import annotations

from typing import Any

from softgrpo_engine.sequence import Sequence


def hits_stop_string(sequence: Sequence, tokenizer: Any) -> bool:
    """Whether the newest token completes one of the sample's stop strings."""
    stop = sequence.params.stop
    if not stop or len(sequence.tokens) < sequence.params.min_tokens:
        return False
    # A hit ends in the newest token, and a character has at most four tokens (its bytes): however
    # long the sample is, its tail is enough.
    tail = sequence.tokens[-4 * max(map(len, stop)) - 4 :]
    text = tokenizer.decode(tail, skip_special_tokens=True)
    return any(string in text for string in stop)


def sample_text(sequence: Sequence, tokenizer: Any) -> str:
    """The text generated so far, cut before the first stop string; empty without a tokenizer."""
    if tokenizer is None:
        return ""
    text: str = tokenizer.decode(sequence.tokens, skip_special_tokens=True)
    cuts = [text.find(string) for string in sequence.params.stop if string in text]
    return text[: min(cuts)] if cuts else text
