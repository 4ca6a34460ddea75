"""The layout of the repository: who may import whom, how long a file is, what a folder says."""

import ast
import tomllib
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A package, and a room of one, imports only what stands further left.
PACKAGES = "softgrpo_kernels softgrpo_engine softgrpo_vllm softgrpo"
ROOMS = {
    "softgrpo_engine": (
        "params soft_tokens outputs transfer ops model training scheduling requests execution "
        "hf_engine llm async_llm"
    ),
    "softgrpo": (
        "config algorithm distributed data rollout rewards learner log report evaluation run "
        "trainer supervised tools serve trl cli train"
    ),
}
# What a room knows nothing of, beside what stands further right.
NEVER = {
    "softgrpo_kernels": "transformers safetensors rich numpy",
    # Back ends are chosen above them, and what all of them follow knows none.
    "softgrpo_kernels.cpu": "softgrpo_kernels.gpu softgrpo_kernels.reference",
    "softgrpo_kernels.gpu": "softgrpo_kernels.cpu softgrpo_kernels.reference",
    "softgrpo_kernels.reference": "softgrpo_kernels.cpu softgrpo_kernels.gpu",
    "softgrpo_kernels.methods": (
        "softgrpo_kernels.cpu softgrpo_kernels.gpu softgrpo_kernels.reference"
    ),
    "softgrpo_engine.scheduling": "torch numpy softgrpo_kernels",
    "softgrpo_engine.params": "torch numpy",
    # A plug-in: whoever has no vLLM does without it.
    "softgrpo": "softgrpo_vllm",
    "softgrpo.algorithm": "softgrpo_engine transformers",
}
FOLDERS = {
    "softgrpo_kernels": ROOT / "kernels" / "softgrpo_kernels",
    "softgrpo_engine": ROOT / "engine" / "softgrpo_engine",
    "softgrpo_vllm": ROOT / "engine" / "softgrpo_vllm",
    "softgrpo": ROOT / "softgrpo",
}
LONGEST = 400  # lines of a file


def name_of(path):
    """softgrpo_engine.model.decoder of .../softgrpo_engine/model/decoder.py."""
    package = next(name for name, folder in FOLDERS.items() if path.is_relative_to(folder))
    parts = path.relative_to(FOLDERS[package]).with_suffix("").parts
    return ".".join((package, *parts)).removesuffix(".__init__")


MODULES = {
    name_of(path): ast.parse(path.read_text())
    for folder in FOLDERS.values()
    for path in sorted(folder.rglob("*.py"))
}


def within(name, room):
    return name == room or name.startswith(f"{room}.")


def imports(name, *, when_imported=False):
    """Full names that a module imports, wherever in it, those of TYPE_CHECKING too; or only those
    outside of functions."""
    found, waiting = set(), [MODULES[name]]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {part if part in MODULES else node.module for part in parts}
        elif not (when_imported and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            waiting += ast.iter_child_nodes(node)
    return found


def broken(rooms):
    """Imports, by modules of the rooms, of rooms further right."""
    return [
        f"{name} imports {imported}"
        for i, room in enumerate(rooms)
        for name in MODULES
        if within(name, room)
        for imported in sorted(imports(name))
        if any(within(imported, later) for later in rooms[i + 1 :])
    ]


def test_packages_depend_in_one_direction():
    assert not broken(PACKAGES.split())


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_depend_in_one_direction(package):
    rooms = [f"{package}.{room}" for room in ROOMS[package].split()]
    there = {".".join(name.split(".")[:2]) for name in MODULES if within(name, package)}
    assert there == {package, *rooms}
    assert not broken(rooms)


@pytest.mark.parametrize("room", NEVER)
def test_what_a_room_knows_nothing_of(room):
    members = [name for name in MODULES if within(name, room)]
    assert members
    for name in members:
        for imported in imports(name):
            assert not any(within(imported, other) for other in NEVER[room].split()), name


def test_no_modules_import_each_other():
    """Imported one by one, each after all that it imports; circles are left over."""
    left = {name: imports(name, when_imported=True) & set(MODULES) for name in MODULES}
    while free := {name for name, others in left.items() if not others & set(left)}:
        left = {name: others for name, others in left.items() if name not in free}
    assert not {name: sorted(others & set(left)) for name, others in left.items()}


def test_no_file_is_long():
    folders = (*FOLDERS.values(), ROOT / "kernels" / "csrc", ROOT / "engine" / "csrc")
    kinds = {".py", ".cpp", ".h", ".inc", ".js", ".css", ".html"}
    for path in chain.from_iterable(folder.rglob("*") for folder in folders):
        if path.suffix in kinds:
            lines = len(path.read_text().splitlines())
            assert lines <= LONGEST, f"{path.relative_to(ROOT)}: {lines} lines"


def test_every_folder_says_what_it_holds():
    for folder in {path.parent for root in FOLDERS.values() for path in root.rglob("*.py")}:
        said = ast.get_docstring(MODULES[name_of(folder / "__init__.py")])
        assert said, folder.relative_to(ROOT)


def test_folders_that_would_shadow_installed_packages_are_no_packages():
    """A top-level package `kernels` shadows the one of PyPI, which transformers imports."""
    for folder in ("kernels", "engine", "benchmarks", "tests"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_the_kernels_alone_are_built_as_with_the_rest():
    whole, kernels = (
        tomllib.loads((folder / "pyproject.toml").read_text())
        for folder in (ROOT, ROOT / "kernels")
    )
    assert kernels["build-system"] == whole["build-system"]
    for key in ("version", "license", "license-files", "requires-python"):
        assert kernels["project"][key] == whole["project"][key]
    assert (ROOT / "kernels" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    (torch,) = kernels["project"]["dependencies"]
    assert torch in whole["project"]["dependencies"]
    wheels = [project["tool"]["scikit-build"]["wheel"]["packages"] for project in (whole, kernels)]
    assert wheels[0] == [str(folder.relative_to(ROOT)) for folder in FOLDERS.values()]
    assert wheels[1] == ["softgrpo_kernels"]
