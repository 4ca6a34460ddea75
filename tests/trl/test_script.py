"""The script of docs/trl.md, as it stands there, on a tiny model."""

import re
from pathlib import Path

import pytest

pytest.importorskip("trl.trainer", reason="TRL is not installed: make test-trl")

from softgrpo_engine import LLM, SamplingParams

DOCS = Path(__file__).parents[2] / "docs" / "trl.md"
CHAT = "aabbcc"  # whatever the messages: the tiny tokenizer knows no digits


def test_the_script_of_the_docs(hf_model, tokenizer, tmp_path, monkeypatch):
    (script,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    hf_model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    (tmp_path / "tiny" / "chat_template.jinja").write_text(CHAT)
    monkeypatch.chdir(tmp_path)
    assert '"smollm2-135m"' in script
    script = script.replace("smollm2-135m", str(tmp_path / "tiny"))
    names = {"__name__": "__main__"}
    exec(script, names)
    rows = [row for row in names["trainer"].state.log_history if "grad_norm" in row]
    assert len(rows) == 2
    # What comes out is a model for every command of ours, with its soft settings.
    llm = LLM(tmp_path / "runs" / "trl" / "model", kv_memory=0.01, max_model_len=64)
    (output,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4, seed=0), progress=False)
    assert output.samples[0].soft.kind.bool().any()
