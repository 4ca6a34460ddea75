"""softgrpo-sft."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from softgrpo.cli.errors import one_line_errors
from softgrpo.config import SupervisedConfig

DESCRIPTION = """\
Trains a language model on prompts with targets whose positions are tokens or mixtures of tokens:
it learns to predict, and to read, the mixtures that soft thinking feeds it. One process, on the
CPU or a GPU. The model that it leaves is one for softgrpo-train, -eval and -generate.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``softgrpo-sft``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="softgrpo-sft",
        description=DESCRIPTION,
        epilog="example: softgrpo-sft --config sft.yaml run.name=mine optim.lr=5e-6 run.seed=1",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that win over the file"
    )
    arguments = parser.parse_intermixed_args(argv)
    with one_line_errors(parser.prog, "interrupted; run.resume=auto continues"):
        config = SupervisedConfig.load(arguments.config, arguments.overrides)
        # Imported here: a misspelt key is told at once, not after seconds of imports.
        from softgrpo.supervised.trainer import SupervisedTrainer

        folder = SupervisedTrainer(config).train()
        print(f"metrics {folder / 'metrics.jsonl'}")
        if config.checkpoint.export_hf:
            print(f"model   {folder / 'model'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
