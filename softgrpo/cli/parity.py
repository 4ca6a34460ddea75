"""softgrpo-parity."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from softgrpo.cli.errors import one_line_errors
from softgrpo.config import Config, recipe_names

if TYPE_CHECKING:
    from softgrpo.tools.parity import Difference

DESCRIPTION = """\
Draws one rollout and compares what engine, trainer and transformers (HF) make of its positions.
Exit status 1 when a mean is beyond its bound: 1e-4 nats in float32, 0.1 in bfloat16.
"""
QUESTIONS = (
    "What is 12 + 30?",
    "Name three animals that can swim.",
    "A train leaves at 9:40 and arrives at 11:05. How long does the journey take?",
    "Which is larger, 0.9 or 0.11?",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``softgrpo-parity``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="softgrpo-parity",
        description=DESCRIPTION,
        epilog="example: softgrpo-parity smollm2-135m model.dtype=float32",
    )
    parser.add_argument(
        "subject",
        metavar="MODEL_OR_CONFIG",
        help="recipe or YAML file, with its own prompts; or a model, with a few questions",
    )
    parser.add_argument("--prompts", type=int, default=4, help="prompts (%(default)s)")
    parser.add_argument("--samples", type=int, default=2, help="of a prompt (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=32, help="new tokens (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    try:
        with one_line_errors(parser.prog):
            return _compare(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)


def _compare(arguments: argparse.Namespace) -> int:
    config, questions = _subject(arguments)
    # Heavy imports come after the arguments are known to be good.
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from softgrpo.data.examples import Example
    from softgrpo.data.prompts import build_prompt
    from softgrpo.data.training import TrainingData
    from softgrpo.learner.device import check_device, device_type
    from softgrpo.tools.parity import compare
    from softgrpo_engine.model.source import resolve_model

    disable_progress_bar()
    check_device(config, device_type())
    data = None if questions else TrainingData(config)
    path = resolve_model(config.model.path)
    tokenizer = AutoTokenizer.from_pretrained(str(path))
    if data is not None:
        data.prepare(tokenizer)
        drawn = data.prompts_of_round(0, config.rollout.prompts_per_step)
        prompts = [prompt.token_ids for prompt in drawn]
    else:
        prompts = [build_prompt(Example(text, "", {}), tokenizer) for text in questions]
    differences = compare(config, path, tokenizer, prompts[: arguments.prompts])
    _print(config, differences)
    return 0 if all(difference.holds for difference in differences) else 1


def _subject(arguments: argparse.Namespace) -> tuple[Config, Sequence[str]]:
    """The configuration, and the questions where it has no data of its own."""
    subject, overrides = arguments.subject, list(arguments.overrides)
    overrides += [
        f"rollout.group_size={arguments.samples}",
        f"rollout.max_new_tokens={arguments.max_tokens}",
        "rollout.max_batch_size=64",
    ]
    if subject in recipe_names() or Path(subject).suffix in (".yaml", ".yml"):
        return Config.load(subject, overrides), ()
    # Soft for the first half, then discrete: every kind of position.
    half = f"rollout.soft.max_soft_tokens={max(1, arguments.max_tokens // 2)}"
    return Config.load("demo", [f"model.path={subject}", half, *overrides]), QUESTIONS


def _print(config: Config, differences: Sequence[Difference]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    objective = config.algorithm.objective if config.rollout.soft.enabled else "discrete"
    title = f"{config.model.path}, {config.model.dtype}, {objective}"
    table = Table(
        title=f"|difference| in nats: {title}",
        title_justify="left",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for name in ("phase", "of", "between", "values", "mean", "max", "bound", ""):
        table.add_column(name, justify="right" if name in ("values", "mean", "max") else "left")
    for d in differences:
        verdict = "" if d.bound is None else "ok" if d.holds else "TOO FAR"
        numbers = (f"{d.count}", f"{d.mean:.2g}", f"{d.max:.2g}")
        bound = "" if d.bound is None else f"{d.bound:g}"
        table.add_row(d.where, d.what, d.who, *numbers, bound, verdict)
    console = Console()
    console.print(table)
    far = [d for d in differences if not d.holds]
    if far:
        console.print(f"out of bounds: {far[0].who}, {far[0].what} of {far[0].where} positions")
    else:
        console.print("within bounds: engine, trainer and transformers agree")


if __name__ == "__main__":
    sys.exit(main())
