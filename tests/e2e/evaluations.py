"""A small evaluation and what it leaves."""

import json


def small(model, task, output):
    """The arguments of a run of softgrpo-eval that takes a second."""
    return [
        *("--model", str(model), "--task", str(task), "--samples", "4", "--max-tokens", "24"),
        *("--dtype", "float32", "--tau", "0.7", "--temperature", "0.8,1.0"),
        *("--output", str(output)),
    ]


def read(folder):
    """results.json without the times."""
    results = json.loads((folder / "results.json").read_text())
    del results["speed"]
    return results
