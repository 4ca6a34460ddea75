"""Every launch of a Triton kernel twice: the kernel in Triton's interpreter, and its stand-in.

Both get copies of the same memory, and all of it, whatever lies around a tensor included, must come
out the same.
"""

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted", allow_module_level=True)

from triton.runtime.interpreter import GridExecutor

from simulated_gpu.stand_ins import STAND_INS

DTYPES = [torch.float32, torch.bfloat16]

# Kernels whose numbers are promised to the bit.
EXACT = {
    "rope_store_kv.rope_store_kv_kernel",
    "rotate_heads.rotate_heads_kernel",
    "gumbel_noise.gumbel_noise_kernel",
    "soft_embedding.soft_embedding_kernel",
    "mixture.record_mixture_kernel",
    "row_parameters.fill_rows_kernel",
}
# Whose probabilities meet values of a narrow dtype as sums of two of its numbers.
ATTENTION = {"paged_attention.decode_kernel", "paged_attention.join_kernel"}
# (relative, absolute): another exp and another order of a sum; of a narrow dtype one rounding.
TOLERANCES = {
    torch.float64: (1e-6, 1e-6),
    torch.float32: (3e-6, 5e-6),
    torch.bfloat16: (2**-7, 1e-5),
    torch.float16: (2**-10, 1e-5),
}


@pytest.fixture(autouse=True)
def poison():
    """What is allocated holds NaN, or the largest integer, until it is written."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels launched so far; every launch is compared."""
    names, run = [], GridExecutor.__call__

    def compared(executor, *args, **kwargs):
        name = f"{executor.fn.__module__.rpartition('.')[2]}.{executor.fn.__name__}"
        names.append(name)
        known = inspect.signature(executor.fn).parameters
        arguments = inspect.getcallargs(
            executor.fn, *args, **{k: v for k, v in kwargs.items() if k in known}
        )
        copies = copied(arguments)
        run(executor, *args, **kwargs)
        STAND_INS[name](executor.grid, **copies)
        for argument, value in arguments.items():
            if torch.is_tensor(value):
                compare(name, argument, whole(value), whole(copies[argument]))

    monkeypatch.setattr(GridExecutor, "__call__", compared)
    return names


def copied(arguments):
    """The same views of copies of the storages."""
    storages = {}

    def copy(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage.clone()
        new = torch.empty(0, dtype=tensor.dtype)
        storage = storages[storage.data_ptr()]
        return new.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())

    return {k: copy(v) if torch.is_tensor(v) else v for k, v in arguments.items()}


def whole(tensor):
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.detach().as_strided((size,), (1,), 0)


def compare(name, argument, kernel, stand_in):
    rtol = atol = 0.0
    if argument == "histogram":  # of masses, which are exponentials
        kernel, stand_in = kernel.double(), stand_in.double()
    if kernel.is_floating_point() and name not in EXACT:
        rtol, atol = TOLERANCES[kernel.dtype]
        atol = max(atol, 2e-5) if name in ATTENTION else atol
    torch.testing.assert_close(
        stand_in, kernel, rtol=rtol, atol=atol, equal_nan=True,
        msg=lambda text: f"{name}: {argument}: {text}",
    )  # fmt: skip


def jitted(path):
    """Names of the @triton.jit functions of a file."""
    for node in ast.parse(path.read_text()).body:
        decorators = getattr(node, "decorator_list", [])
        if any("triton.jit" in ast.unparse(decorator) for decorator in decorators):
            yield node.name


def launched(package):
    """{"module.kernel": the kernel} of every `kernel[grid](...)` of the package."""
    found, folder = {}, Path(package.__file__).parent
    for path in folder.rglob("*.py"):
        own = set(jitted(path))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                name = node.func.value
                assert isinstance(name, ast.Name), f"{path.name}: {ast.unparse(node.func)}"
                assert name.id in own, f"{path.name} launches {name.id} of another file"
                parts = path.relative_to(folder).with_suffix("").parts
                module = importlib.import_module(".".join((package.__name__, *parts)))
                found[f"{path.stem}.{name.id}"] = getattr(module, name.id)
    return found


def assert_same_arguments(name, kernel):
    """The stand-in takes what the kernel does."""
    parameters = list(inspect.signature(STAND_INS[name]).parameters)
    assert parameters == ["grid", *inspect.signature(kernel.fn).parameters]


class Cases:
    """Which test launches which kernels."""

    def __init__(self):
        self.reached = {}

    def reaches(self, *names):
        """The test launches these kernels."""

        def decorate(test):
            self.reached[test.__name__] = set(names)
            return test

        return decorate

    def assert_reached(self, test, launches):
        assert set(launches) == self.reached[test.__name__]
