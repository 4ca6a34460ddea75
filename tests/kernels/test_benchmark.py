"""benchmarks/kernels.py runs, and writes what it promises."""

import json

import pytest

QUICK = ("kernels.py", "--quick", "--repeats", "1")


def test_every_op_is_measured_against_its_floor(run_benchmark, tmp_path, capsys):
    path = tmp_path / "kernels.json"
    run_benchmark(*QUICK, "--json", path)
    shown = capsys.readouterr().out
    document = json.loads(path.read_text())
    assert {"hardware", "versions", "settings", "rows"} == set(document)
    assert {row["op"] for row in document["rows"]} == {
        "soft_token",
        "soft_embedding",
        "gumbel_noise",
        "linear_soft_logprob",
        "linear_token_logprob",
    }
    for row in document["rows"]:
        assert row["microseconds"] > 0
        assert row["floor_microseconds"] > 0
        assert row["implementation"] in shown


def test_an_unknown_op_is_named(run_benchmark):
    with pytest.raises(SystemExit, match="--op nothing"):
        run_benchmark(*QUICK, "--op", "nothing")
