"""softgrpo-report: writes the report of a run folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from softgrpo.report import build_report


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(
        prog="softgrpo-report",
        description="Write RUN_DIR/report.html, one file that opens offline.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a run: runs/demo")
    parser.add_argument(
        "--compare", type=Path, metavar="OTHER_RUN", help="draw the curves of this run as well"
    )
    arguments = parser.parse_args(argv)
    try:
        print(build_report(arguments.run_dir, arguments.compare))
    except (ValueError, OSError) as error:
        print(f"softgrpo-report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
