"""Compiles the device and loads it, before PyTorch is imported."""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

SOURCES = Path(__file__).parent / "csrc"
BUILD = Path(__file__).parents[2] / "build" / "simulated_gpu"
NAME = "simulated_gpu_device"


def load() -> ModuleType | str:
    """The extension module, or why there is none."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return "PyTorch is not installed"
    torch = Path(found.origin).parent
    if list((torch / "lib").glob("*torch_cuda*")) or list((torch / "lib").glob("*torch_hip*")):
        return "this build of PyTorch has its own CUDA kernels: make test-gpu runs on a real device"
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        return "the simulated device needs Linux and a C++ compiler"
    if "torch" in sys.modules:
        return "PyTorch was imported before the simulated device"
    library = _compiled(compiler, torch)
    # Its static registrations must be there when PyTorch is imported.
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None
    assert spec.loader is not None
    import torch as _  # noqa: F401

    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compiled(compiler: str, torch: Path) -> Path:
    """The shared library, made anew where a source or PyTorch has changed."""
    sources = sorted(SOURCES.iterdir())
    version = (torch / "version.py").read_bytes()
    key = hashlib.sha256(
        b"".join([version, sys.version.encode(), *(s.read_bytes() for s in sources)])
    )
    library = BUILD / key.hexdigest()[:16] / f"{NAME}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_suffix(f".{os.getpid()}")
    includes = (torch / "include", torch / "include/torch/csrc/api/include")
    command = [
        *(compiler, "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-fvisibility=hidden"),
        f"-DTORCH_EXTENSION_NAME={NAME}",
        *(f"-I{path}" for path in (*includes, sysconfig.get_paths()["include"])),
        *(str(SOURCES / "simulated_gpu.cpp"), "-o", str(unfinished)),
        *(f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}"),
        *("-ltorch_python", "-ltorch_cpu", "-ltorch", "-lc10"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the simulated device does not compile:\n{done.stderr[-4000:]}")
    unfinished.rename(library)
    return library
