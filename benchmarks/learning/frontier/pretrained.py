"""Can a pretrained model be taught to read mixtures, and from which depth on does it pay?

    python benchmarks/learning/frontier/pretrained.py --layers 6 --hops 3    # cells, resumable
    python benchmarks/learning/frontier/pretrained.py --layers 30 --hops 5 --starts
    python benchmarks/learning/frontier/pretrained.py --table

SmolLM2, whole (30 layers) or cut to its first, is taught to think the hops of a graph as mixtures,
as one path, or with filler in their place, from as many questions and steps; then each arm is
reinforced at three learning rates with seed 0 and at the best with the others. The more layers, the
more hops can be followed while the question is read: then thoughts are not needed. What is done is
a JSON file in cells_pretrained/, which is committed.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from arms import CENSORED, DISCRETE, MEAN, Arm, budget, fillers, multiplex
from evaluate import SAMPLES, Evaluation, variants_of
from pathwise import train as train_pathwise
from starts import taught
from words import FILLER, Words, write_cut_model, write_words

from softgrpo import Config, Trainer
from softgrpo.distributed import World
from softgrpo.run.export import export_model
from softgrpo_engine.model.weights import load_decoder

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))
from _machine import device_name

HERE = Path(__file__).resolve().parent
CELLS = HERE / "cells_pretrained"
HELD_OUT = 256
ASKED = 5000
RATES = ("3e-6", "1e-5", "3e-5")


@dataclass(frozen=True)
class Task:
    """layers: kept of SmolLM2. hops: of a graph. steps: of a start, batches of 16 graphs."""

    layers: int
    hops: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.layers}-layers-{self.hops}-hops-{self.steps}-steps"

    @property
    def arms(self) -> dict[str, Arm]:
        thoughts = budget(self.hops)
        return {
            "discrete": Arm("path", (*DISCRETE, *thoughts)),
            "filler": Arm("filler", fillers(self.hops, FILLER)),
            "multiplex 8": Arm("mixture", (*multiplex(8), *thoughts)),
            "censored": Arm("mixture", (*CENSORED, *thoughts)),
            "mean": Arm("mixture", (*MEAN, *thoughts)),
            "mean, pathwise": Arm("mixture", (*MEAN, *thoughts), pathwise=True),
        }


def right_answer(
    prompts: list[Any], completions: list[str], answer: list[str], **columns: Any
) -> list[float]:
    """1 where the letter after the thoughts is the answer's."""
    return [
        float(text[-1:] == right.strip()) for text, right in zip(completions, answer, strict=True)
    ]


class Experiment:
    """The cells of a task, under a folder for what need not be kept."""

    def __init__(self, task: Task, root: Path) -> None:
        self.task, self.root = task, root / task.name
        self.words = Words(task.hops)
        self.data = root / f"{task.hops}-hops-{task.steps}-steps"
        write_words(self.data, self.words, taught=16 * task.steps, asked=ASKED)
        write_cut_model(self.root / "model", task.layers)

    def start(self, start: str, seed: int) -> Path:
        """The model of a supervised start, trained unless it is there."""
        more = (f"run.seed={seed}", f"run.max_steps={self.task.steps}")
        places = (f"model.path={self.root / 'model'}", f"data.train={self.data / start}.jsonl")
        folder = self.root / f"{start}-{seed}"
        return taught(folder, HERE / "pretrained_sft.yaml", *more, *places)

    def config(self, arm: Arm, seed: int, model: Path, *more: str) -> Config:
        overrides = [f"data.train={self.data}/asked.jsonl", f"data.eval={self.data}/asked.jsonl"]
        overrides += [f"model.path={model}", f"run.seed={seed}", *arm.overrides, *more]
        return Config.load(HERE / "pretrained_rl.yaml", overrides)

    def evaluation(self, model: Path) -> Evaluation:
        questions = self.words.questions("held_out", HELD_OUT)
        return Evaluation(model, questions, self.words.filler, "bfloat16")

    def run_start(self, start: str, seed: int) -> None:
        path = self._path(f"start-{start}-{seed}")
        if path.exists():
            return
        model = self.start(start, seed)
        evaluation = self.evaluation(model)
        scores = {
            name: evaluation.scores(self.config(arm, seed, model), variants_of(arm))
            for name, arm in self.task.arms.items()
            if arm.start == start
        }
        self._write(path, {"start": start, "seed": seed, "scores": scores})

    def run_arm(self, name: str, rate: str, seed: int) -> None:
        path = self._arm_path(name, rate, seed)
        if path.exists():
            return
        print(f"== {path.stem}", flush=True)
        arm = self.task.arms[name]
        start = self.start(arm.start, seed)
        more = (f"optim.lr={rate}", f"run.output_dir={self.root / 'runs'}", f"run.name={path.stem}")
        config = self.config(arm, seed, start, *more)
        model = self.root / "runs" / path.stem / "model"
        if arm.pathwise:
            rewards = self._pathwise(config, start, model)
        else:
            folder = Trainer(config, reward_funcs=[right_answer]).train()
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            rewards = [row["reward"] for row in map(json.loads, lines) if "reward" in row]
        scores = self.evaluation(model).scores(config, variants_of(arm))
        row = {"arm": name, "start": arm.start, "lr": rate, "seed": seed, "reward": rewards}
        self._write(path, {**row, "scores": scores})

    def _pathwise(self, config: Config, start: Path, model: Path) -> list[float]:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        decoder = load_decoder(start, torch.float32, device).train()
        rewards = train_pathwise(
            decoder,
            self.words.questions("asked", ASKED),
            thoughts=self.task.hops,
            steps=config.run.max_steps,
            batch=config.rollout.prompts_per_step,
            lr=config.optim.lr,
            seed=config.run.seed,
            dtype=torch.bfloat16,
        )
        export_model(decoder.named_parameters(), start, model, None, World())
        return rewards

    def best_rate(self, name: str) -> str:
        """Of seed 0, by the held-out accuracy in the arm's own way."""

        def accuracy(rate: str) -> float:
            cell = json.loads(self._arm_path(name, rate, 0).read_text())
            return cell["scores"]["own"]["mean"]["value"]

        return max(RATES, key=accuracy)

    def _arm_path(self, name: str, rate: str, seed: int) -> Path:
        return self._path(f"{name.replace(', ', '-').replace(' ', '-')}-lr-{rate}-{seed}")

    def _path(self, cell: str) -> Path:
        return CELLS / f"{self.task.name}-{cell}.json"

    def _write(self, path: Path, row: dict[str, Any]) -> None:
        path.parent.mkdir(exist_ok=True)
        about = {"task": self.task.name, "machine": device_name(), "samples": SAMPLES}
        path.write_text(json.dumps({**row, **about}) + "\n")


def print_table() -> None:
    """Every task that has cells: accuracy taught and reinforced, and with other thoughts."""
    cells = [json.loads(path.read_text()) for path in sorted(CELLS.glob("*.json"))]
    columns = "own | maj | deterministic | argmax fed | filler fed"
    print(f"| task | thoughts | | {columns} |\n|---|---|---|---|---|---|---|---|")
    for cell in cells:
        arms = {cell["arm"]: cell["scores"]} if "arm" in cell else cell["scores"]
        when = f"lr {cell['lr']}" if "arm" in cell else "taught"
        for name, scores in arms.items():
            keys = [("own", "mean"), ("own", "maj")]
            keys += [(variant, "mean") for variant in ("deterministic", "argmax", "filler")]
            values = [scores[v][s]["value"] if v in scores else None for v, s in keys]
            shown = " | ".join("" if value is None else f"{value:.3f}" for value in values)
            print(f"| {cell['task']} | {name} | {when}, seed {cell['seed']} | {shown} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30, help="of SmolLM2's 30 (%(default)s)")
    parser.add_argument("--hops", type=int, default=3, help="of a graph, 3 to 6 (%(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="of a start (%(default)s)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--starts", action="store_true", help="the supervised starts alone")
    parser.add_argument("--only", nargs="+", metavar="START", help="of these starts")
    parser.add_argument("--output", type=Path, default=Path("runs/pretrained"))
    parser.add_argument("--table", action="store_true", help="prints what is there")
    arguments = parser.parse_args()
    if arguments.table:
        print_table()
        return
    task = Task(arguments.layers, arguments.hops, arguments.steps)
    experiment = Experiment(task, arguments.output.resolve())
    starts = arguments.only or list(dict.fromkeys(arm.start for arm in task.arms.values()))
    for seed in range(arguments.seeds):
        for start in starts:
            experiment.run_start(start, seed)
        for name, arm in task.arms.items():
            if arguments.starts or arm.start not in starts:
                continue
            for rate in RATES if seed == 0 else (experiment.best_rate(name),):
                experiment.run_arm(name, rate, seed)


if __name__ == "__main__":
    main()
