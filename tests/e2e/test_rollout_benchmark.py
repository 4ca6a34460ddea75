"""Benchmarks of rollouts and of steps run and write what they promise, and name absent peers."""

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


def test_a_training_step_part_by_part(run_benchmark, tiny_model, tmp_path):
    path = tmp_path / "step.json"
    options = ["--prompts", "2", "--group-size", "2", "--new-tokens", "4", "--steps", "1"]
    options += ["--compare", "trl", "--json", path]
    run_benchmark(
        "train_step.py", *options, f"model.path={tiny_model}", "data.max_prompt_tokens=999"
    )
    document = json.loads(path.read_text())
    assert "--trl-python" in document["absent"]["trl"]
    assert [row["mode"] for row in document["rows"]] == ["soft", "discrete"]
    for row in document["rows"]:
        parts = [row[part] for part in ("time/rollout", "time/reward", "time/train", "time/sync")]
        assert abs(sum(parts) - row["seconds"]) < 0.01
        assert row["tokens_per_second"] > 0
        assert row["mfu"] >= 0


def test_a_step_of_a_recipe_beside_its_plan(run_benchmark, tiny_model, tmp_path, capsys):
    path = tmp_path / "step.json"
    overrides = [f"model.path={tiny_model}", "rollout.prompts_per_step=2", "rollout.group_size=2"]
    overrides += ["optim.minibatch_prompts=1", "rollout.max_new_tokens=8", "rollout.kv_memory=0.01"]
    overrides += ["data.max_prompt_tokens=64"]
    options = ["--steps", "1", "--prompt-tokens", "20", "--json", path]
    run_benchmark("recipe_step.py", "paper-1.5b", *overrides, *options)
    rows = {row["phase"]: row for row in json.loads(path.read_text())["rows"]}
    assert set(rows) == {"start", "rollout", "update"}
    for phase in ("rollout", "update"):
        assert rows[phase]["seconds"] > 0
        assert 0 < rows[phase]["planned_peak_gib"] < 1
        assert rows[phase]["peak_gib"] is None  # a CPU does not tell
    assert "random weights" in capsys.readouterr().out
