"""Where a mixture means something to the reader: graph reachability, from scratch.

    python benchmarks/learning/frontier/experiment.py            # all cells, each resumable
    python benchmarks/learning/frontier/experiment.py --starts   # the supervised starts alone
    python benchmarks/learning/frontier/experiment.py 'multiplex*' --seeds 1

A start is `softgrpo-sft` from random weights: thoughts that are frontiers (mixture), nodes of one
path, the frontiers listed node by node, or filler. An arm continues it by `Trainer`, at three
learning rates with seed 0 and at the best of them with the other seeds. What is done is a JSON file
in cells/, which is committed: the next call goes on from there. `table.py` prints and draws them.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, RATES, Arm
from evaluate import SAMPLES, Evaluation, variants_of
from graphs import FILL, HOPS
from pathwise import train as train_pathwise
from starts import taught
from toy import ASKED, HELD_OUT, ID, questions, write_toy

from softgrpo import Config, Trainer
from softgrpo.distributed import World
from softgrpo.run.export import export_model
from softgrpo_engine.model.weights import load_decoder

HERE = Path(__file__).resolve().parent
CELLS = HERE / "cells"


def right_answer(
    prompts: list[Any],
    completions: list[str],
    completion_ids: list[list[int]],
    answer: list[str],
    **columns: Any,
) -> list[float]:
    """1 where the token after the thoughts is the answer."""
    pairs = zip(completion_ids, answer, strict=True)
    return [float(ids[-1] == ID[right]) for ids, right in pairs]


def start_model(root: Path, start: str, seed: int) -> Path:
    """The model of a supervised start, trained unless it is there."""
    more = (f"run.seed={seed}", f"model.path={root / 'data' / 'model'}")
    data = f"data.train={root / 'data' / start}.jsonl"
    return taught(root / "starts" / f"{start}-{seed}", HERE / "sft.yaml", *more, data)


def arm_config(root: Path, arm: Arm, seed: int, model: Path, *more: str) -> Config:
    data = root / "data"
    overrides = [f"data.train={data}/asked.jsonl", f"data.eval={data}/held_out.jsonl"]
    overrides += [f"model.path={model}", f"run.seed={seed}", *arm.overrides, *more]
    return Config.load(HERE / "rl.yaml", overrides)


def evaluation_of(model: Path) -> Evaluation:
    return Evaluation(model, questions("held_out", HELD_OUT), ID[FILL])


def run_start(root: Path, start: str, seed: int) -> None:
    """The cell of a start: tested in the ways of all arms that continue it."""
    path = CELLS / f"start-{start}-{seed}.json"
    if path.exists():
        return
    model = start_model(root, start, seed)
    evaluation = evaluation_of(model)
    scores = {
        name: evaluation.scores(arm_config(root, arm, seed, model), variants_of(arm))
        for name, arm in ARMS.items()
        if arm.start == start
    }
    _write(path, {"start": start, "seed": seed, "scores": scores})


def run_arm(root: Path, name: str, rate: str, seed: int) -> None:
    path = cell_path(name, rate, seed)
    if path.exists():
        return
    print(f"== {path.stem}", flush=True)
    arm = ARMS[name]
    start = start_model(root, arm.start, seed)
    more = (f"optim.lr={rate}", f"run.output_dir={root / 'runs'}", f"run.name={path.stem}")
    config = arm_config(root, arm, seed, start, *more)
    if arm.pathwise:
        decoder = load_decoder(start, torch.float32, torch.device("cpu")).train()
        rewards = train_pathwise(
            decoder,
            questions("asked", ASKED),
            thoughts=HOPS,
            steps=config.run.max_steps,
            batch=config.rollout.prompts_per_step,
            lr=config.optim.lr,
            seed=seed,
        )
        model = root / "runs" / path.stem / "model"
        export_model(decoder.named_parameters(), start, model, None, World())
    else:
        folder = Trainer(config, reward_funcs=[right_answer]).train()
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        rewards = [row["reward"] for row in map(json.loads, lines) if "reward" in row]
        model = folder / "model"
    scores = evaluation_of(model).scores(config, variants_of(arm))
    row = {"arm": name, "start": arm.start, "lr": rate, "seed": seed, "reward": rewards}
    _write(path, {**row, "scores": scores})


def cell_path(name: str, rate: str, seed: int) -> Path:
    return CELLS / f"{name.replace(', ', '-').replace(' ', '-')}-lr-{rate}-{seed}.json"


def best_rate(name: str) -> str | None:
    """The learning rate whose run of seed 0 has the highest held-out accuracy in its own way."""
    done = {
        r: json.loads(cell_path(name, r, 0).read_text())
        for r in RATES
        if cell_path(name, r, 0).exists()
    }
    if len(done) < len(RATES):
        return None
    return max(done, key=lambda rate: done[rate]["scores"]["own"]["mean"]["value"])


def _write(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**row, "samples": SAMPLES}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arms", nargs="*", default=["*"], help="patterns of names, as 'multiplex*'")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--starts", action="store_true", help="the supervised starts alone")
    parser.add_argument("--output", type=Path, default=Path("runs/frontier"))
    arguments = parser.parse_args()
    chosen = [a for a in ARMS if any(fnmatch.fnmatch(a, p) for p in arguments.arms)]
    if not chosen:
        parser.error(f"no arm is called {' or '.join(arguments.arms)}: {', '.join(ARMS)}")
    root = arguments.output.resolve()
    write_toy(root / "data")
    for seed in range(arguments.seeds):
        for start in dict.fromkeys(ARMS[name].start for name in chosen):
            run_start(root, start, seed)
        for name in chosen if not arguments.starts else []:
            rates = RATES if seed == 0 else [best_rate(name)]
            for rate in rates:
                assert rate is not None  # seed 0 has run before
                run_arm(root, name, rate, seed)


if __name__ == "__main__":
    main()
