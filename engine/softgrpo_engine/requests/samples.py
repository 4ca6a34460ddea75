"""What a sample has come to: its text, and the strings that end it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softgrpo_engine.outputs import PromptLogprobs, Sample
from softgrpo_engine.scheduling.sequence import Sequence
from softgrpo_engine.soft_tokens import SoftTokens


def hits_stop_string(sequence: Sequence, tokenizer: Any) -> bool:
    """Whether the newest token completes one of the sample's stop strings."""
    stop = sequence.params.stop
    if not stop or len(sequence.tokens) < sequence.min_tokens:
        return False
    # A hit ends in the newest token, and a character has at most four tokens (its bytes): however
    # long the sample is, its tail is enough.
    tail = sequence.tokens[-4 * max(map(len, stop)) - 4 :]
    text = tokenizer.decode(tail, skip_special_tokens=True)
    return any(string in text for string in stop)


def as_sample(sequence: Sequence, soft: SoftTokens, logprobs: Tensor, tokenizer: Any) -> Sample:
    """The sample so far, with its record."""
    return Sample(
        text=_text(sequence, tokenizer),
        token_ids=list(sequence.tokens),
        logprobs=logprobs,
        soft=soft,
        finish_reason=sequence.finish_reason,
        uid=sequence.uid,
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
    """The text generated so far, cut before the first stop string; empty without a tokenizer."""
    if tokenizer is None:
        return ""
    text: str = tokenizer.decode(sequence.tokens, skip_special_tokens=True)
    cuts = [text.find(string) for string in sequence.params.stop if string in text]
    return text[: min(cuts)] if cuts else text
