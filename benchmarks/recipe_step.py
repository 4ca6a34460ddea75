"""Steps of a recipe at its real shape, with random weights: memory and seconds beside the plan.

    python benchmarks/recipe_step.py paper-1.5b rollout.prompts_per_step=8 \
        optim.minibatch_prompts=4 rollout.max_new_tokens=2048 --json results.json

The model has the shape of the recipe's and random weights, its answers have their full length, and
rewards take turns, so that every sample has a gradient: nothing is downloaded. Planned is what
`softgrpo-train --plan` says of one GPU and the same settings; seconds for this device's measured
copy rate. On a CPU there are no peaks to be read. The first step compiles: it is not counted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _machine import hardware, versions
from _random_model import write_questions, write_random_model
from rich.console import Console
from rich.table import Table
from train_step import alternating

from softgrpo import Config, Trainer
from softgrpo.tools.plan import make_plan
from softgrpo.tools.plan.model import model_config
from softgrpo.tools.plan.seconds import Hardware

GIB = 2**30
# Phases of the plan that are one part here: the passes and the optimizer take turns.
PARTS = {"rollout": ("rollout",), "update": ("old densities", "reference", "update")}


class Watch:
    """Calls something, and remembers how long it took and the most that was held meanwhile."""

    def __init__(self, called: Any) -> None:
        self._called = called
        self.seconds: list[float] = []
        self.peaks: list[float | None] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._called, name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        result = self._called(*arguments, **options)
        if on_gpu:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - started)
        self.peaks.append(torch.cuda.max_memory_allocated() / GIB if on_gpu else None)
        return result


def measured(config: Config, steps: int) -> list[dict[str, Any]]:
    """{phase, peak_gib, seconds} of the start and both parts of a step, without the first."""
    start = Watch(lambda: Trainer(config, reward_funcs=[alternating]))
    trainer = start()
    parts = {"rollout": Watch(trainer._sample), "update": Watch(trainer.update)}
    trainer._sample, trainer.update = parts["rollout"], parts["update"]  # type: ignore[method-assign]
    for step in range(1, steps + 2):
        trainer.step(step)
    trainer.rewards.close()
    rows = [{"phase": "start", "peak_gib": start.peaks[0], "seconds": None}]
    for phase, watch in parts.items():
        peak = None if watch.peaks[0] is None else max(p for p in watch.peaks if p is not None)
        rows.append({"phase": phase, "peak_gib": peak, "seconds": median(watch.seconds[1:])})
    return rows


def planned(config: Config, machine: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of one GPU: {phase: {peak_gib, seconds}}."""
    device = Hardware(bandwidth=machine["memory_gb_per_s"] * 1e9)
    column = make_plan(config, device).columns[0]
    plan = {"start": {"peak_gib": column.peaks["start"] / GIB}}
    for part, phases in PARTS.items():
        known = [phase for phase in phases if phase in column.peaks]
        plan[part] = {
            "peak_gib": max(column.peaks[phase] for phase in known) / GIB,
            "seconds": sum(column.seconds[phase] for phase in known),
        }
    return plan


def main() -> None:
    arguments = _parser().parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = hardware(device)
    recipe = Config.load(arguments.recipe, arguments.overrides)
    plan = planned(recipe, machine)
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(_config(arguments, recipe, Path(folder)), arguments.steps)
    for row in rows:
        row |= {f"planned_{name}": value for name, value in plan[row["phase"]].items()}
    Console().print(_table(arguments.recipe, rows, machine))
    if arguments.json:
        settings = {"recipe": arguments.recipe, "overrides": arguments.overrides}
        settings |= {"prompt_tokens": arguments.prompt_tokens, "steps": arguments.steps}
        document = {"hardware": machine, "versions": versions(), "settings": settings, "rows": rows}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


def _config(arguments: argparse.Namespace, recipe: Config, folder: Path) -> Config:
    write_random_model(model_config(recipe.model.path), folder / "model")
    questions = write_questions(folder, 512, arguments.prompt_tokens)
    data = (f"data.train={questions}", "data.eval=null", "data.prompt_template='{problem}'")
    without = ("eval.every=0", "eval.before_train=false", "eval.after_train=false")
    kept = ("checkpoint.every=0", "checkpoint.export_hf=false", "log.samples_every=0")
    places = (f"model.path={folder / 'model'}", f"run.output_dir={folder / 'runs'}")
    overrides = [*data, *without, *kept, *places, f"run.max_steps={arguments.steps + 1}"]
    return Config.load(arguments.recipe, [*arguments.overrides, *overrides])


def _table(name: str, rows: list[dict[str, Any]], machine: dict[str, Any]) -> Table:
    table = Table(title=f"{name}, random weights, on {machine.get('gpu') or machine['cpu']}")
    for column in ("phase", "GiB", "planned", "s", "planned"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for row in rows:
        names = ("peak_gib", "planned_peak_gib", "seconds", "planned_seconds")
        values = (row.get(name) for name in names)
        table.add_row(row["phase"], *("" if v is None else f"{v:.2f}" for v in values))
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("recipe", help="its name or file")
    add("overrides", nargs="*", metavar="section.key=value", help="settings of the run")
    add("--steps", type=int, default=2, help="after the first; the median is shown (%(default)s)")
    add("--prompt-tokens", type=int, default=780, help="of a prompt, about (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="writes the figures here")
    return parser


if __name__ == "__main__":
    main()
