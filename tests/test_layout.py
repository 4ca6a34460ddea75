"""The layout of the repository: who may import whom."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "softgrpo_kernels": ROOT / "kernels" / "softgrpo_kernels",
    "softgrpo_engine": ROOT / "engine" / "softgrpo_engine",
    "softgrpo": ROOT / "softgrpo",
}
# Left to right: a package imports only what stands before it.
ORDER = list(PACKAGES)


def imports(path):
    """Top-level names that a file imports, wherever in it; those of TYPE_CHECKING count too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
    return names


def tops(path):
    return {name.split(".")[0] for name in imports(path)}


def test_kernels_engine_trainer_depend_in_that_direction():
    for i, package in enumerate(ORDER):
        files = list(PACKAGES[package].rglob("*.py"))
        assert files
        for path in files:
            later = tops(path) & set(ORDER[i + 1 :])
            assert not later, f"{path.relative_to(ROOT)} imports {later}"


def test_kernels_need_torch_and_nothing_else_of_weight():
    for path in PACKAGES["softgrpo_kernels"].rglob("*.py"):
        assert not tops(path) & {"transformers", "safetensors", "rich", "numpy"}, path


def test_scheduler_and_cache_know_no_torch():
    for name in ("scheduler", "kv_cache", "sequence", "params"):
        path = PACKAGES["softgrpo_engine"] / f"{name}.py"
        assert not tops(path) & {"torch", "softgrpo_kernels", "numpy"}, path


def test_folders_that_would_shadow_installed_packages_are_no_packages():
    """A top-level package `kernels` shadows the one of PyPI, which transformers imports."""
    for folder in ("kernels", "engine", "benchmarks", "tests"):
        assert not (ROOT / folder / "__init__.py").exists()
