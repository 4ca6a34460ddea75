"""Which tests see a GPU: those of `make test-gpu`, as `make` would run them."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from simulated_gpu import found

ROOT = Path(__file__).parent.parent
ASKED = "SOFTGRPO_TEST_GPU=1"


def command(target):
    """The last one: those before it install what is missing."""
    # By itself make names the folder, last of all, where it was started by `make test`.
    arguments = ["make", "--dry-run", "--no-print-directory", target]
    listed = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()[-1].split()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_gpu_is_asked_for():
    assert ASKED in command("test-gpu")
    assert ASKED not in command("test")


@pytest.mark.parametrize("asked", [False, True])
def test_the_tests_of_the_cpu_do_not_see_a_gpu(asked):
    """Whoever starts them, and however."""
    environment = {k: v for k, v in os.environ.items() if "VISIBLE_DEVICES" not in k}
    environment["SOFTGRPO_TEST_GPU"] = str(int(asked))
    look = (
        "from simulated_gpu import visible; visible.hide_gpus();"
        "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"
    )
    seen = subprocess.run(
        [sys.executable, "-c", look], env=environment, cwd=ROOT / "tests", check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert seen.stdout.strip() == ("None" if asked else "-1")


@pytest.mark.skipif(found.REAL, reason="make test-gpu")
def test_this_process_does_not_see_one():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "-1"


def test_the_extras_are_those_of_the_package():
    """`make test-trl` installs one without building the package again."""
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"$(PIP) '{extra['trl'][0]}'" in (ROOT / "Makefile").read_text()
