"""benchmarks/rollout_throughput.py runs, writes what it promises, and says which peer is absent."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "rollout_throughput.py"


def test_rows_and_absent_peers(tmp_path):
    path = tmp_path / "rollout.json"
    arguments = ["--batch-sizes", "2", "--new-tokens", "3", "--repeats", "1", "--json", str(path)]
    # An interpreter without vLLM is a peer that fails.
    arguments += ["--compare", "vllm", "llama.cpp", "--vllm-python", sys.executable]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(path.read_text())
    assert {"hardware", "versions", "settings", "rows", "absent"} == set(document)
    assert set(document["absent"]) == {"vllm", "llama.cpp"}
    assert "No module named 'vllm'" in document["absent"]["vllm"]
    assert "--llama-bench" in document["absent"]["llama.cpp"]
    assert [(row["engine"], row["mode"]) for row in document["rows"]] == [
        ("softgrpo", "soft"), ("softgrpo", "discrete")
    ]  # fmt: skip
    for row in document["rows"]:
        assert row["tokens_per_second"] > 0
        assert row["of_limit"] > 0
    assert sys.executable not in path.read_text()
