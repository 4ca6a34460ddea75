"""What the engine gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from softgrpo_engine.soft_tokens import SoftTokens

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Sample:
    """One sample of a prompt.

    token_ids: generated ids, an ending EOS included. logprobs: float32 [T], log p of the token at
    every position, under the distribution it was drawn from. soft: SoftTokens [T, K]. uid: its name
    for the noise. finish_reason is None while it is still being generated. group: a number that the
    samples of its prompt in its call share with no others: `LLM.abort` finds it by that.
    kept_mass: where it was asked for, float32 [T], the probability over the vocabulary of the set
    that the token was drawn from: logprobs + log kept_mass is log p over the vocabulary. NaN at
    soft positions.
    """

    text: str
    token_ids: list[int]
    logprobs: Tensor
    soft: SoftTokens
    finish_reason: FinishReason | None
    uid: int
    group: int = -1
    kept_mass: Tensor | None = None


@dataclass(frozen=True)
class PromptLogprobs:
    """The tokens of a prompt after its first, as the model would draw them discretely at T 1.

    logprobs: float32 [P - 1], log p of each. ids, top: int32, float32 [P - 1, k], the most likely
    tokens in its place and their log p, best first.
    """

    logprobs: Tensor
    ids: Tensor
    top: Tensor


@dataclass(frozen=True)
class Output:
    """All samples of one prompt, in the order of their uids.

    prompt_logprobs: where `SamplingParams.prompt_logprobs` asks for them.
    """

    prompt_token_ids: list[int]
    samples: list[Sample]
    prompt_logprobs: PromptLogprobs | None = None
