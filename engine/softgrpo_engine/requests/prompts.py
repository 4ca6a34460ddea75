"""Prompts as people give them, to token ids."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

# A text, token ids, or chat messages.
Prompt = str | list[int] | list[dict[str, str]]


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    items = list(prompts)
    if items and isinstance(items[0], int | dict):
        return [items]  # type: ignore[list-item]
    return items  # type: ignore[return-value]


def encode(prompt: Prompt, tokenizer: Any) -> list[int]:
    """Token ids of a prompt. Chat messages go through the chat template; a text that already starts
    with the BOS token does not get a second one."""
    if tokenizer is None and not (prompt and isinstance(prompt[0], int)):
        raise ValueError("this engine has no tokenizer: give prompts as token ids")
    if isinstance(prompt, str):
        bos = tokenizer.bos_token
        has_bos = bos is not None and prompt.startswith(bos)
        return list(tokenizer.encode(prompt, add_special_tokens=not has_bos))
    if prompt and isinstance(prompt[0], dict):
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        return list(tokenizer.encode(text, add_special_tokens=False))
    return list(prompt)  # type: ignore[arg-type]


def uids_of_call(prompts: Sequence[list[int]], n: int) -> list[list[int]]:
    """Names of the n samples of every prompt. A prompt that comes again goes on where it ended:
    copies are one prompt with more samples, not the same samples again."""
    seen: Counter[tuple[int, ...]] = Counter()
    uids = []
    for prompt in map(tuple, prompts):
        uids.append(default_uids(prompt, n, first=n * seen[prompt]))
        seen[prompt] += 1
    return uids


def default_uids(token_ids: Sequence[int], n: int, first: int = 0) -> list[int]:
    """Names of the samples of a prompt: (hash32(prompt ids) + sample index) mod 2^32, so that they
    do not depend on what else is generated. first: the index of the first of the n."""
    digest = zlib.crc32(np.asarray(token_ids, dtype="<i4").tobytes())
    return [(digest + i) % 2**32 for i in range(first, first + n)]


def thinking_end_id(setting: str | int | None, tokenizer: Any) -> int | None:
    """Id of the token that ends the soft phase; "auto" is </think> where the tokenizer has it.

    Raises ValueError for a text that is not exactly one token.
    """
    if setting is None or isinstance(setting, int):
        return setting
    if tokenizer is None:
        if setting == "auto":
            return None
        raise ValueError(f"end_of_thinking={setting!r} needs a tokenizer: give the token's id")
    if setting != "auto":
        return token_id("end_of_thinking", setting, tokenizer)
    ids = _ids_of("</think>", tokenizer)
    return ids[0] if len(ids) == 1 else None


def token_id(name: str, token: str | int, tokenizer: Any) -> int:
    """Id of a token given as its text or its id.

    Raises ValueError, naming it by ``name``, for what is not exactly one token of the tokenizer.
    """
    if isinstance(token, int):
        if 0 <= token < len(tokenizer):
            return token
        raise ValueError(f"{name}={token} is outside the vocabulary of {len(tokenizer)}")
    ids = _ids_of(token, tokenizer)
    if len(ids) == 1:
        return ids[0]
    raise ValueError(f"{name}={token!r} is {len(ids)} tokens of this model, it must be exactly one")


def _ids_of(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text; none for a single token that the tokenizer does not know."""
    ids = [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]
    return [] if ids == [tokenizer.unk_token_id] else ids
