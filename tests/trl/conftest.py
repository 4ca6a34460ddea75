"""A tiny model in a directory, and trainers of it; without TRL nothing here is collected."""

from importlib.metadata import PackageNotFoundError, version

import pytest

try:
    version("trl")
except PackageNotFoundError:
    collect_ignore = ["test_trainer.py", "test_script.py"]
