"""softgrpo-train."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from softgrpo.cli.errors import one_line_errors
from softgrpo.config import Config, recipe_names

DESCRIPTION = """\
Trains a language model with SofT-GRPO, or with discrete GRPO (rollout.soft.enabled=false).
With no arguments it trains the packaged recipe `demo`: SmolLM2-135M on small sums, on a CPU.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``softgrpo-train``; returns the exit status."""
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    overrides = list(arguments.overrides)
    if arguments.engine:
        overrides.append(f"rollout.engine={arguments.engine}")
    if arguments.report_to:
        overrides.append(f"log.report_to=[{arguments.report_to}]")
    with one_line_errors(parser.prog, "interrupted; run.resume=auto continues"):
        config = Config.load(arguments.config, overrides)
        # Imported here: a misspelt key is told at once, not after seconds of imports.
        if arguments.json and not arguments.plan:
            parser.error("--json goes with --plan")
        if arguments.plan:
            return _plan(config, arguments.json)
        elif arguments.dry_run:
            from softgrpo.tools.dry_run import dry_run

            if (facts := dry_run(config)) is not None:
                print(facts)
        else:
            _train(config)
    return 0


def _train(config: Config) -> None:
    from softgrpo.trainer import Trainer

    trainer = Trainer(config)
    folder = trainer.train()
    if trainer.world.is_first:
        print(f"report  {folder / 'report.html'}")
        if config.checkpoint.export_hf:
            print(f"model   {folder / 'model'}")


def _plan(config: Config, json_file: str | None) -> int:
    """Prints the plan; 1 where the run fits on no number of GPUs."""
    import json
    from pathlib import Path

    from rich.console import Console

    from softgrpo.tools.plan import make_plan

    plan = make_plan(config)
    Console().print(plan.table())
    for line in plan.advice():
        print(line)
    if json_file:
        Path(json_file).write_text(json.dumps(plan.rows(), indent=1) + "\n")
    return 0 if plan.fits else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="softgrpo-train",
        description=DESCRIPTION,
        epilog="example: softgrpo-train --config demo run.name=mine optim.lr=5e-6 run.seed=1",
    )
    add = parser.add_argument
    add(
        "--config",
        default="demo",
        metavar="RECIPE_OR_FILE",
        help=f"packaged recipe ({', '.join(recipe_names())}) or YAML file (default: demo)",
    )
    add("--engine", help="native, vllm, hf or an installed engine (rollout.engine)")
    add(
        "--report-to",
        metavar="SERVICE[,...]",
        help="metrics also to tensorboard, wandb or trackio (log.report_to)",
    )
    add("--dry-run", action="store_true", help="check everything, try a tiny step, leave nothing")
    add(
        "--plan",
        action="store_true",
        help="memory and time on 1, 8 and 64 GPUs; 1: it fits on none",
    )
    add("--json", metavar="FILE", help="with --plan: also its rows as JSON")
    add("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
