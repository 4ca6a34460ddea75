"""Examples as the model sees them: token ids by its chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from softgrpo.config.rollout import FillerConfig
from softgrpo.config.sections import FewShot
from softgrpo.data.examples import Example, Message
from softgrpo.data.sources import DataError
from softgrpo_engine.requests.prompts import thinking_end_id, token_id


@dataclass(frozen=True)
class Prompt:
    """An example as the model sees it: token_ids end where the assistant's answer begins."""

    example: Example
    token_ids: list[int]


def build_prompt(
    example: Example,
    tokenizer: Any,
    system_prompt: str | None = None,
    few_shot: Sequence[FewShot] = (),
    filler: Sequence[int] = (),
) -> list[int]:
    """Token ids of `chat_text`; filler: ids of `filler_thoughts`, put behind it."""
    (ids,) = encode_chats([chat_text(example, tokenizer, system_prompt, few_shot)], tokenizer)
    return [*ids, *filler]


def encode_chats(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of `chat_text`s, all at once: the tokenizer shares them among threads."""
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
    return ids


def chat_text(
    example: Example,
    tokenizer: Any,
    system_prompt: str | None = None,
    few_shot: Sequence[FewShot] = (),
) -> str:
    """The prompt by the model's chat template, up to where the assistant's turn begins.

    The template alone writes special tokens, BOS included, and a <think> that opens the answer.
    Raises DataError when the tokenizer has no template, when the template refuses the turns, or
    when the example brings a system message of its own beside `system_prompt`.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("the tokenizer has no chat template; give the model a chat_template.jinja")
    turns: list[Message] = (
        [{"role": "user", "content": example.prompt}]
        if isinstance(example.prompt, str)
        else list(example.prompt)
    )
    system = [turns.pop(0)] if turns[0]["role"] == "system" else []
    if system and system_prompt is not None:
        raise DataError("the prompt has a system message of its own; unset data.system_prompt")
    if system_prompt is not None:
        system = [{"role": "system", "content": system_prompt}]
    shots = [
        {"role": role, "content": content}
        for shot in few_shot
        for role, content in (("user", shot.prompt), ("assistant", shot.answer))
    ]
    try:
        text: str = tokenizer.apply_chat_template(
            system + shots + turns, add_generation_prompt=True, tokenize=False
        )
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in system + shots + turns)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"the model's chat template refuses {roles}: {reason}") from None
    return text


def filler_thoughts(
    filler: FillerConfig, end_of_thinking: str | int | None, tokenizer: Any
) -> list[int]:
    """The ids that end a prompt in the place of thoughts: `filler.count` copies of its token, and
    the end of thinking (as in SoftParams) where the tokenizer has it; nothing for a count of 0.

    Raises DataError for a token that is none, or more than one.
    """
    if not filler.count:
        return []
    try:
        token = token_id("the filler token", filler.token, tokenizer)
        end = thinking_end_id(end_of_thinking, tokenizer)
    except ValueError as error:
        raise DataError(str(error)) from None
    return [token] * filler.count + ([] if end is None else [end])
