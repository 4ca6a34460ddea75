"""benchmarks/rollout_throughput.py runs, writes what it promises, and says which peer is absent."""

import json
import sys


def test_rows_and_absent_peers(run_benchmark, tiny_model, tmp_path):
    path = tmp_path / "rollout.json"
    arguments = ["--batch-sizes", "2", "--new-tokens", "3", "--repeats", "1", "--json", path]
    # An interpreter without vLLM is a peer that fails.
    arguments += ["--compare", "vllm", "llama.cpp", "--vllm-python", sys.executable]
    run_benchmark("rollout_throughput.py", "--model", tiny_model, *arguments)
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
