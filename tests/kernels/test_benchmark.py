"""benchmarks/kernels.py runs, and writes what it promises."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels.py"


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--repeats", "1", *arguments],
        capture_output=True,
        text=True,
    )


def test_every_op_is_measured_against_its_floor(tmp_path):
    path = tmp_path / "kernels.json"
    done = run("--json", str(path))
    assert done.returncode == 0, done.stderr
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
        assert row["implementation"] in done.stdout


def test_an_unknown_op_is_named():
    done = run("--op", "nothing")
    assert done.returncode != 0
    assert "--op nothing" in done.stderr
