"""softgrpo-report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from softgrpo.cli.errors import one_line_errors
from softgrpo.report import build_report


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``softgrpo-report``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="softgrpo-report",
        description="Write RUN_DIR/report.html, one file that opens offline, and print its path.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a run: runs/demo")
    parser.add_argument(
        "--compare", type=Path, metavar="OTHER_RUN", help="draw the curves of this run as well"
    )
    arguments = parser.parse_args(argv)
    with one_line_errors(parser.prog):
        print(build_report(arguments.run_dir, arguments.compare))
    return 0


if __name__ == "__main__":
    sys.exit(main())
