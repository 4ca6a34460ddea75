"""softgrpo-generate on a tiny model directory."""

import io

import pytest

from softgrpo.cli.generate import main
from softgrpo_engine import LLM, SamplingParams, SoftParams


@pytest.fixture(scope="module")
def model(tmp_path_factory, hf_model, tokenizer):
    path = tmp_path_factory.mktemp("model")
    hf_model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def run(capsys, *arguments):
    status = main([str(x) for x in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_soft_samples_show_every_candidate(capsys, model):
    status, out, _ = run(
        capsys, "aaab", "--model", model, "--soft", "--tau", 1.0, "--max-tokens", 3, "--seed", 1
    )
    assert status == 0
    llm = LLM(model)
    params = SamplingParams(max_tokens=3, seed=1)
    sample = llm.generate("aaab", params, SoftParams(tau=1.0), progress=False)[0].samples[0]
    assert sample.text in out
    lines = [line.split() for line in out.splitlines()]
    for i, row in enumerate(sample.soft.ids.tolist()):
        words = [llm.tokenizer.decode([token]) for token in row if token >= 0]
        line = next(line for line in lines if line[:1] == [str(i)])
        assert line[1::2] == words
        assert abs(sum(map(float, line[2::2])) - 1.0) < 0.03


def test_text_only_is_only_the_text(capsys, monkeypatch, model):
    monkeypatch.setattr("sys.stdin", io.StringIO("aaab\n"))
    status, out, _ = run(
        capsys, "--model", model, "--text", "--n", 2, "--max-tokens", 4, "--seed", 3
    )
    assert status == 0
    params = SamplingParams(max_tokens=4, seed=3, n=2)
    samples = LLM(model).generate("aaab", params, progress=False)[0].samples
    assert out.splitlines() == [sample.text for sample in samples]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-p", "2"], "top_p=2.0 is not allowed"),
        (["--tau", "0.5"], "--tau is a setting of soft tokens: add --soft"),
        (["--chat"], "no chat template: use --raw"),
        (["--max-tokens", "100000"], "prompt 0 has 2 tokens.*context is 512"),
    ],
)
def test_mistakes_get_one_line(capsys, model, arguments, message):
    import re

    status, out, err = run(capsys, "aaab", "--model", model, *arguments)
    assert status == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert re.search(message, err)
