"""Does soft thinking learn better? All runs of the experiment, each resumable.

    python benchmarks/learning/experiment.py                      # everything, in this order
    python benchmarks/learning/experiment.py 'easy/exact*'        # cells by name
    python benchmarks/learning/experiment.py --grid               # the cells of grid.py
    python benchmarks/learning/experiment.py --list

Both modes start from the same model: the base model, trained by discrete GRPO on the form of an
answer alone (scoring.format_reward), so that what differs afterwards is not who found the box
first. Every cell is `softgrpo-train` and then `softgrpo-eval` on held-out operands. Called again,
the command goes on where it was stopped. `analyse.py` makes tables and figures of what is there.
"""

from __future__ import annotations

import argparse
import fnmatch
import shutil
import subprocess
import sys
from pathlib import Path

from cells import CELLS, DISCRETE, HERE, SAMPLES, Cell, is_done, read_training
from grid import first_cells, later_cells, record_path, write_record
from small import write_small
from tasks import write_tasks

from softgrpo.evaluation.results import read_results

sys.path.insert(1, str(HERE.parent))
from _machine import device_name

FORMAT_STEPS = 20


def train(root: Path, cell: Cell, model: str, *extra: str) -> Path:
    """Runs a cell's training up to its end; the folder of the run."""
    folder = root / cell.path
    data, questions = root / "data", "hard" if cell.task == "small" else cell.task
    command: list[object] = [
        sys.executable,
        "-m",
        "softgrpo.cli.train",
        "--config",
        HERE / f"{cell.task}.yaml",
    ]
    command += [f"data.{split}={data}/{questions}_{split}.jsonl" for split in ("train", "eval")]
    command += [f"run.output_dir={folder.parent}", f"run.name={folder.name}", "run.resume=auto"]
    command += [f"run.seed={cell.seed}", f"model.path={model}", *extra, *cell.overrides]
    _run(command)
    return folder


def evaluate(root: Path, folder: Path, model: Path, modes: str) -> None:
    """The held-out questions, as the run of the folder asks them; resumable by itself."""
    command: list[object] = [
        sys.executable,
        "-m",
        "softgrpo.cli.eval",
        "--model",
        model,
        "--mode",
        modes,
    ]
    command += ["--recipe", folder / "config.yaml", "--samples", SAMPLES]
    command += ["--output", folder / "evaluation"]
    _run(command)


def _run(command: list[object]) -> None:
    status = subprocess.run([str(part) for part in command], check=False).returncode
    if status:
        raise SystemExit(status)  # the command has said why


def start_model(root: Path, task: str) -> Path:
    """The model that all runs of a task start from."""
    return small_model(root) if task == "small" else format_model(root, task)


def small_model(root: Path) -> Path:
    """Taught from scratch, see small.py."""
    folder, data = root / "small" / "taught", root / "data" / "small"
    if not (folder / "model" / "model.safetensors").exists():
        write_small(data)
        command: list[object] = [sys.executable, "-m", "softgrpo.cli.sft", "--config"]
        command += [HERE / "small_sft.yaml", f"run.output_dir={folder.parent}", "run.name=taught"]
        command += [f"model.path={data / 'model'}", f"data.train={data / 'taught.jsonl'}"]
        _run(command)
    return folder / "model"


def format_model(root: Path, task: str) -> Path:
    """SmolLM2 that knows the form of an answer, evaluated in both modes."""
    reward = f"reward.functions=[{{path: '{HERE / 'scoring.py'}:format_reward'}}]"
    cell = Cell(task, "format", 0, DISCRETE)
    folder = root / cell.path
    if not is_done(folder):
        extra = (reward, f"run.max_steps={FORMAT_STEPS}", "eval.before_train=false")
        train(root, cell, "smollm2-135m", *extra)
        evaluate(root, folder, folder / "model", "soft,discrete")
        shutil.rmtree(folder / "checkpoints")
    return folder / "model"


def run(root: Path, cell: Cell, modes: str) -> Path:
    """A cell from where it was left to its end. Its weights are not kept: they take 2 GB."""
    folder = root / cell.path
    if not is_done(folder):
        start = start_model(root, cell.task)
        print(f"== {cell.path}", flush=True)
        train(root, cell, str(start), "eval.before_train=false", "eval.after_train=false")
        evaluate(root, folder, folder / "model", modes)
        shutil.rmtree(folder / "checkpoints")
        shutil.rmtree(folder / "model")
    return folder


def run_on_the_grid(root: Path, cell: Cell) -> None:
    """A soft run is also tested with discrete tokens: does what softness gave remain?"""
    if not record_path(cell).exists():
        folder = run(root, cell, "discrete" if cell.mode == "discrete" else "soft,discrete")
        results = read_results(folder / "evaluation")
        write_record(cell, device_name(), read_training(folder), results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells", nargs="*", default=["*"], help="patterns, as easy/exact*")
    parser.add_argument("--output", type=Path, default=Path("runs/learning"))
    parser.add_argument("--grid", action="store_true", help="the cells of grid.py instead")
    parser.add_argument("--list", action="store_true", help="the cells and whether they are done")
    arguments = parser.parse_args()

    def chosen(cells: list[Cell]) -> list[Cell]:
        return [c for c in cells if any(fnmatch.fnmatch(c.path, p) for p in arguments.cells)]

    root = arguments.output.resolve()
    cells = [*first_cells(), *later_cells()] if arguments.grid else CELLS
    if not chosen(cells):
        parser.error(f"no cell is called {' or '.join(arguments.cells)}; see --list")
    if arguments.list:
        for cell in chosen(cells):
            done = record_path(cell).exists() if arguments.grid else is_done(root / cell.path)
            print(f"{'done' if done else 'todo'}  {cell.path}  {' '.join(cell.overrides)}")
        return
    write_tasks(root / "data")
    if arguments.grid:
        for cell in chosen(first_cells()):
            run_on_the_grid(root, cell)
        for cell in chosen(later_cells()):  # of the rates that are known by now
            run_on_the_grid(root, cell)
        return
    for cell in chosen(CELLS):
        run(root, cell, cell.mode)


if __name__ == "__main__":
    main()
