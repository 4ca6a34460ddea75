"""report.html of an evaluation."""

from pathlib import Path
from typing import Any

from softgrpo.evaluation.folder import EvalFolder


def write_page(folder: EvalFolder, results: dict[str, Any]) -> Path:
    return folder.report
