"""The code of docs/engine.md, as it stands there, on a tiny model."""

import re
from pathlib import Path

import pytest

DOCS = (Path(__file__).parents[2] / "docs" / "engine.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", DOCS, flags=re.DOTALL)


@pytest.fixture
def model(tmp_path, hf_model, tokenizer):
    hf_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    return tmp_path


def test_the_examples_run_in_their_order(model, capsys):
    # The tiny tokenizer knows "aa" to "dp" only.
    names = {}
    for code in CODE:
        for real, tiny in (
            ("smollm2-135m", str(model)),
            ("What is 2 + 3?", "aaab"),
            ("Name a colour.", "acad"),
        ):
            code = code.replace(real, tiny)
        exec(code, names)
    assert len(CODE) == 4
    assert len(names["outputs"][0].samples) == 4
    assert bool(names["sample"].soft.kind.any())
    assert 1 <= len(capsys.readouterr().out.split()) <= 9
    assert [len(outputs) for outputs in names["answers"]] == [1, 1]
    assert names["llm"].metrics()["weight_version"] == 1
    assert names["llm"].has_weights


def test_every_public_method_is_in_the_table():
    from softgrpo_engine import LLM

    methods = {name for name, value in vars(LLM).items() if callable(value) and name[0] != "_"}
    missing = {name for name in methods if f"`{name}(" not in DOCS}
    assert not missing
