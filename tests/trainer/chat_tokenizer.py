"""A tokenizer whose ids can be read."""

from types import SimpleNamespace


class ChatTokenizer:
    """Writes a turn as <role>content; one id a character."""

    chat_template = "present"

    def apply_chat_template(self, turns, *, add_generation_prompt, tokenize):
        assert not tokenize
        text = "".join(f"<{turn['role']}>{turn['content']}" for turn in turns)
        return text + "<assistant>" * add_generation_prompt

    def __call__(self, texts, *, add_special_tokens, verbose):
        assert not add_special_tokens
        return SimpleNamespace(input_ids=[list(map(ord, text)) for text in texts])


def text_of(ids):
    return "".join(map(chr, ids))
