"""What `rollout.ahead=1` costs in learning: each rollout drawn while the update before it runs.

    python benchmarks/learning/frontier/ahead.py --output runs/frontier

Arms of `experiment.py` at their best learning rate, from one supervised start, three seeds, both
with the importance correction that it requires. Cells and the table go to ahead.json, which is
committed; a cell that is there is not run again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from arms import ARMS
from experiment import CELLS, HERE, arm_config, best_rate, evaluation_of, right_answer, start_model
from toy import write_toy

from softgrpo import Trainer

CHOSEN = ("discrete", "censored", "gumbel exact")
SEEDS = range(3)
CORRECTED = "algorithm.correction.mode=truncate"
FILE = HERE / "ahead.json"


def run(root: Path, name: str, seed: int, ahead: int) -> dict[str, Any]:
    """A cell: training reward and largest ratio of every step, held-out accuracy after them."""
    arm, rate = ARMS[name], best_rate(name)
    start = start_model(root, arm.start, 0)
    run_name = f"ahead-{ahead}-{name.replace(' ', '-')}-{seed}"
    more = (f"optim.lr={rate}", CORRECTED, f"rollout.ahead={ahead}")
    folders = (f"run.output_dir={root / 'runs'}", f"run.name={run_name}")
    config = arm_config(root, arm, seed, start, *more, *folders)
    folder = Trainer(config, reward_funcs=[right_answer]).train()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward" in row]
    scores = evaluation_of(folder / "model").scores(config, ["own"])
    return {
        "arm": name,
        "lr": rate,
        "seed": seed,
        "ahead": ahead,
        "reward": [row["reward"] for row in steps],
        "ratio": [row["sampling/importance_sampling_ratio/max"] for row in steps],
        "after": scores["own"]["mean"]["value"],
    }


def print_table(cells: list[dict[str, Any]]) -> None:
    print("| thoughts | before | after, ahead 0 | after, ahead 1 | last 50 rewards, 0 | 1 |")
    print("|---|---|---|---|---|---|")
    for name in CHOSEN:
        sides = [[c for c in cells if (c["arm"], c["ahead"]) == (name, a)] for a in (0, 1)]
        if not all(sides):
            continue
        start = json.loads((CELLS / f"start-{ARMS[name].start}-0.json").read_text())
        columns = [f"{start['scores'][name]['own']['mean']['value']:.3f}"]
        for side in sides:
            after = [cell["after"] for cell in side]
            columns.append(f"{mean(after):.3f} ({', '.join(f'{value:.3f}' for value in after)})")
        columns += [f"{mean(mean(cell['reward'][-50:]) for cell in side):.3f}" for side in sides]
        print(f"| {name} | {' | '.join(columns)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/frontier"))
    root = parser.parse_args().output.resolve()
    write_toy(root / "data")
    cells = json.loads(FILE.read_text()) if FILE.exists() else []
    done = {(cell["arm"], cell["seed"], cell["ahead"]) for cell in cells}
    for seed in SEEDS:
        for name in CHOSEN:
            for ahead in (0, 1):
                if (name, seed, ahead) not in done:
                    cells.append(run(root, name, seed, ahead))
                    FILE.write_text(json.dumps(cells) + "\n")
    print_table(cells)


if __name__ == "__main__":
    main()
