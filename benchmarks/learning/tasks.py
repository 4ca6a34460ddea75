"""The questions of the experiment, from reasoning_gym, held out by operand.

    python benchmarks/learning/tasks.py runs/learning/data

Writes {easy,hard}_{train,eval}.jsonl with the columns expression and answer. A training question
has no operand n with n % 7 == 3, a held-out one has at least one: what is tested are numbers that
were never added in training. reasoning_gym makes item i of a dataset from seed + i, so the seeds
of the lists lie further apart than the lists are long.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

TRAIN_SIZE, EVAL_SIZE = 8000, 128
EASY = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
HARD = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 2}
SEEDS = {("easy", "train"): 0, ("easy", "eval"): 10**6, ("hard", "train"): 2 * 10**6}
SEEDS |= {("hard", "eval"): 3 * 10**6}


def is_held_out(expression: str) -> bool:
    """Whether an operand of the expression is reserved for the evaluation."""
    return any(int(operand) % 7 == 3 for operand in re.findall(r"\d+", expression))


def questions(task: str, split: str) -> Iterator[dict[str, str]]:
    """Distinct questions of one split, in the order of the seeds."""
    import reasoning_gym  # which takes its time: only where questions are made

    wanted = TRAIN_SIZE if split == "train" else EVAL_SIZE
    candidates = reasoning_gym.create_dataset(
        "chain_sum", **(EASY if task == "easy" else HARD), seed=SEEDS[task, split], size=10**5
    )
    seen: set[str] = set()
    for item in candidates:
        expression = item["metadata"]["expression"]
        if is_held_out(expression) == (split == "eval") and expression not in seen:
            seen.add(expression)
            yield {"expression": expression, "answer": item["answer"]}
        if len(seen) == wanted:
            return
    raise RuntimeError(f"{task} {split}: only {len(seen)} of {wanted} questions")


def write_tasks(folder: Path) -> None:
    """The four files, if they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, split in SEEDS:
        path = folder / f"{task}_{split}.jsonl"
        if not path.exists():
            lines = [json.dumps(row) for row in questions(task, split)]
            path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    write_tasks(parser.parse_args().folder)
