"""Tokens one by one, where their texts alone do not tell what they are in a text."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from softgrpo.serve.tokens import Offsets, TokenTexts

TEXT = "a \U0001f600b\u00e9 \ufffd!"


@pytest.fixture(scope="module")
def of_bytes():
    """A tokenizer whose tokens are bytes, apart from a space with the two after it."""
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("\u0120", "\u00f0"), ("\u0120\u00f0", "\u0141")]
    vocabulary = {name: i for i, name in enumerate([*names, *("".join(pair) for pair in merges)])}
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    return tokenizer


@pytest.fixture(scope="module")
def of_words():
    """SentencePiece's: the space is a part of the word, and dropped before the first."""
    names = ["\u2581a", "\u2581b", "<0xC3>", "<0xA9>", "<unk>", "\u2581", "a", "b"]
    vocabulary = {name: i for i, name in enumerate(names)}
    merges = [("\u2581", "a"), ("\u2581", "b")]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace()],
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def test_offsets_of_characters_that_are_several_tokens(of_bytes):
    ids = of_bytes.encode(TEXT, add_special_tokens=False)
    tokens = TokenTexts(of_bytes)
    assert b"".join(tokens.bytes(token) for token in ids) == TEXT.encode()
    # A space and half of a character; the other half begins where the character does.
    assert tokens.bytes(ids[1]) == b" \xf0\x9f"
    places = Offsets(tokens, 10).of([*ids, of_bytes.eos_token_id, ids[0]])
    assert [place - 10 for place in places] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 6, 7, 8, 8]
    # A stream asks piece by piece.
    offsets = Offsets(tokens, 10)
    assert [offsets.of([token])[0] for token in ids] == places[: len(ids)]


def test_special_tokens_count_where_they_were_sent(of_bytes):
    sent = "a<end>b<end>"
    ids = [of_bytes.eos_token_id, *of_bytes.encode(sent, add_special_tokens=False)]
    tokens = TokenTexts(of_bytes)
    # The first was added, as a BOS is.
    assert Offsets(tokens, 0, sent=sent).of(ids) == [0, 0, 1, 6, 7]
    assert Offsets(tokens, 0).of(ids) == [0, 0, 1, 1, 2]


def test_bytes_that_are_no_character_do_not_hold_up_the_others(of_bytes):
    (lead,) = of_bytes.convert_tokens_to_ids(["\u00f0"])
    ids = [lead] * 6 + of_bytes.encode("ab", add_special_tokens=False)
    text = of_bytes.decode(ids)
    assert Offsets(TokenTexts(of_bytes), 0).of(ids)[-1] == text.index("b")


def test_offsets_where_the_first_word_loses_its_space(of_words):
    ids = [0, 1, 2, 3, 1]
    assert of_words.decode(ids) == "a b\u00e9 b"
    tokens = TokenTexts(of_words)
    assert Offsets(tokens, 0).of(ids) == [0, 1, 3, 3, 4]
    assert [tokens.bytes(token) for token in (2, 3)] == [b"\xc3", b"\xa9"]
