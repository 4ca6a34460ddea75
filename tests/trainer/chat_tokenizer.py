"""A tokenizer whose ids can be read."""


class ChatTokenizer:
    """Writes a turn as <role>content; one id a character."""

    chat_template = "present"

    def apply_chat_template(self, turns, *, add_generation_prompt, tokenize, return_dict):
        assert tokenize
        assert not return_dict
        text = "".join(f"<{turn['role']}>{turn['content']}" for turn in turns)
        return [ord(c) for c in text + "<assistant>" * add_generation_prompt]


def text_of(ids):
    return "".join(map(chr, ids))
