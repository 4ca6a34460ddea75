"""A supervised start, by softgrpo-sft."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def taught(folder: Path, recipe: Path, *overrides: str) -> Path:
    """The model of a run in this folder, trained unless it is there."""
    if not (folder / "model" / "model.safetensors").exists():
        command = [sys.executable, "-m", "softgrpo.cli.sft", "--config", str(recipe)]
        command += [f"run.name={folder.name}", f"run.output_dir={folder.parent}", *overrides]
        status = subprocess.run(command, check=False).returncode
        if status:
            raise SystemExit(status)  # the command has said why
    return folder / "model"
