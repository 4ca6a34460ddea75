"""Does the demo recipe learn? Soft and discrete runs over several seeds, in one table.

    python benchmarks/demo_learning.py --seeds 0 1 2 --json benchmarks/results/demo_learning.json

Every run is the command `softgrpo-train --config demo run.seed=S rollout.soft.enabled=...` in a
process of its own, resumed where an earlier call was stopped. The JSON holds the held-out results
before and after, the reward curve of every run, and the machine; a picture lies beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from _machine import hardware, versions
from rich.console import Console
from rich.table import Table

MODES = {"soft": "true", "discrete": "false"}


def run_folder(output_dir: Path, mode: str, seed: int) -> Path:
    return output_dir / f"{mode}_seed{seed}"


def train(output_dir: Path, mode: str, seed: int, overrides: list[str]) -> None:
    folder = run_folder(output_dir, mode, seed)
    command = [sys.executable, "-m", "softgrpo.cli.train", "--config", "demo"]
    command += [f"run.output_dir={output_dir}", f"run.name={folder.name}", f"run.seed={seed}"]
    command += [f"rollout.soft.enabled={MODES[mode]}", "run.resume=auto"]
    command += ["checkpoint.export_hf=false", *overrides]
    subprocess.run(command, check=True)


def read_run(folder: Path, mode: str, seed: int) -> dict[str, Any]:
    """One row of the results, from the metrics that the run left."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward" in row]
    evaluations = [row for row in rows if any(key.startswith("eval/") for key in row)]
    return {
        "mode": mode,
        "seed": seed,
        "steps": len(steps),
        "before": _plain(evaluations[0]),
        "after": _plain(evaluations[-1]),
        "reward": [row["reward"] for row in steps],
        "mismatch_mean": statistics.mean(
            row["sampling/sampling_logp_difference/mean"] for row in steps
        ),
        "mismatch_max": max(row["sampling/sampling_logp_difference/max"] for row in steps),
        "training_seconds": sum(row["step_time"] for row in steps),
    }


def _plain(row: dict[str, Any]) -> dict[str, float]:
    return {key.removeprefix("eval/"): value for key, value in row.items() if key != "step"}


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="demo recipe: 64 held-out sums, 8 samples each")
    columns = ("mode", "seed", "mean@8", "pass@8", "reward, first and last 10 steps", "mismatch")
    for column in columns:
        table.add_column(column, justify="left" if column == "mode" else "right")
    for row in rows:
        before, after, reward = row["before"], row["after"], row["reward"]
        table.add_row(
            row["mode"],
            str(row["seed"]),
            f"{before['mean@8']:.3f} -> {after['mean@8']:.3f}",
            f"{before['pass@8']:.3f} -> {after['pass@8']:.3f}",
            f"{statistics.mean(reward[:10]):.3f} -> {statistics.mean(reward[-10:]):.3f}",
            f"{row['mismatch_mean']:.3f} (max {row['mismatch_max']:.2f})",
        )
    Console().print(table)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Reward curves as a plain SVG: means of 5 steps, one line a run."""
    width, height, left, bottom = 640, 320, 52, 40
    colours = {"soft": "#0b6e99", "discrete": "#c2571a"}
    most = max(len(row["reward"]) for row in rows)

    def point(step: float, value: float) -> str:
        x = left + (width - left - 16) * step / most
        y = (height - bottom) - (height - bottom - 16) * value / 0.8
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for tick in (0.0, 0.2, 0.4, 0.6, 0.8):
        (x, y), (end, _) = (point(step, tick).split(",") for step in (0, most))
        parts.append(f'<line x1="{x}" y1="{y}" x2="{end}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y}" text-anchor="end" dy="4">{tick:.1f}</text>')
    for step in range(0, most + 1, 10):
        x = point(step, 0).split(",")[0]
        parts.append(f'<text x="{x}" y="{height - 20}" text-anchor="middle">{step}</text>')
    for row in rows:
        reward = row["reward"]
        chunks = [reward[i : i + 5] for i in range(0, len(reward), 5)]
        line = " ".join(point(5 * i + 2.5, statistics.mean(c)) for i, c in enumerate(chunks))
        parts.append(
            f'<polyline points="{line}" fill="none" stroke-width="2" '
            f'stroke="{colours[row["mode"]]}" stroke-opacity="0.85"/>'
        )
    for i, mode in enumerate(colours):
        y = 20 + 18 * i
        parts.append(
            f'<line x1="70" y1="{y}" x2="94" y2="{y}" stroke="{colours[mode]}" stroke-width="3"/>'
        )
        parts.append(
            f'<text x="100" y="{y}" dy="4">{mode} (mean reward of 5 steps, each seed)</text>'
        )
    parts.append(f'<text x="{width / 2}" y="{height - 4}" text-anchor="middle">step</text></svg>')
    path.write_text("\n".join(parts) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo_learning"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    rows = []
    for seed in arguments.seeds:
        for mode in arguments.modes:
            train(arguments.output_dir, mode, seed, arguments.overrides)
            folder = run_folder(arguments.output_dir, mode, seed)
            rows.append(read_run(folder, mode, seed))
    rows.sort(key=lambda row: (list(MODES).index(row["mode"]), row["seed"]))
    show(rows)
    if arguments.json:
        settings = {"recipe": "demo", "overrides": arguments.overrides}
        result = {
            "hardware": hardware(torch.device("cpu")),
            "versions": versions(),
            "settings": settings,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
        draw(rows, arguments.json.with_suffix(".svg"))


if __name__ == "__main__":
    main()
