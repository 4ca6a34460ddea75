"""The commands of the Makefile, as `make` would run them."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def command(target):
    """The last one: those before it install what is missing."""
    # By itself make names the folder, last of all, where it was started by `make test`.
    arguments = ["make", "--dry-run", "--no-print-directory", target]
    listed = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()[-1].split()


def test_the_tests_of_the_cpu_do_not_see_a_gpu():
    hidden = {"CUDA_VISIBLE_DEVICES=-1", "HIP_VISIBLE_DEVICES=-1"}
    assert hidden <= set(command("test"))
    assert not hidden & set(command("test-gpu"))
