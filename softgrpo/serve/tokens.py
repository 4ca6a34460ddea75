"""Tokens one by one: their texts and bytes, and where they begin in a text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

# Shown for bytes that are no whole character.
_REPLACEMENT = "\ufffd"


class TokenTexts:
    """The texts of single tokens; those of one vocabulary are kept."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # As people read it, special ones too.
        self.text = lru_cache(maxsize=None)(lambda token: str(tokenizer.decode([token])))
        self.stands_alone = lru_cache(maxsize=None)(self._stands_alone)

    def decode(self, tokens: Sequence[int]) -> str:
        """Their text in an answer, where special ones are not shown."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def bytes(self, token: int) -> bytes:
        """UTF-8, also of a part of a character."""
        text = self.text(token)
        if _REPLACEMENT not in text:
            return bytes(text, "utf-8")
        name = self.tokenizer.convert_ids_to_tokens(token)
        if re.fullmatch("<0x[0-9A-F]{2}>", name):
            return bytes([int(name[3:5], 16)])
        if all(sign in _BYTE_OF for sign in name):
            return bytes(_BYTE_OF[sign] for sign in name)
        return bytes(text, "utf-8")

    def _stands_alone(self, token: int) -> str | None:
        """Its text, where that is the same after other tokens; else None: parts of a character, and
        words of SentencePiece, which drops the space before the first of what it decodes."""
        text = self.decode([token])
        same = _REPLACEMENT not in text and self.decode([token, token]) == 2 * text
        return text if same else None


class Offsets:
    """Where tokens begin in the text that they make, in characters, one after the other.

    A token that begins inside a character begins where that does. start: of the first one. sent: a
    prompt, which can hold special tokens; others, such as a BOS that was added, are not in a text.
    """

    def __init__(self, tokens: TokenTexts, start: int, sent: str = "") -> None:
        self._tokens, self._sent = tokens, sent
        self._before: list[int] = []  # of the whole characters that came last
        self._open: list[int] = []  # whose last character is not complete
        self._closed, self._begun = start, 0  # characters, and those of _open that are complete

    def of(self, tokens: Sequence[int]) -> list[int]:
        """Of the tokens that come next."""
        return [self._next(token) for token in tokens]

    def _next(self, token: int) -> int:
        own = text = self._tokens.stands_alone(token)
        if own == "" and self._sent.startswith(name := self._tokens.text(token), self._closed):
            own = text = name
        if text is None or self._open:
            known = self._tokens.decode(self._before)
            text = self._tokens.decode([*self._before, *self._open, token])[len(known) :]
        begun = self._begun if own is None else len(text) - len(own)
        start = self._closed + begun
        self._open.append(token)
        # A character has at most four bytes: more are none.
        if text.endswith(_REPLACEMENT) and len(self._open) < 4:
            self._begun = len(text.rstrip(_REPLACEMENT))
        else:
            self._closed, self._begun = self._closed + len(text), 0
            self._before, self._open = self._open, []
        return start


def _byte_of_signs() -> dict[str, int]:
    """The signs of GPT-2's vocabulary: printable bytes are themselves, the others come after."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    signs = {chr(byte): byte for byte in printable}
    return signs | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_of_signs()
