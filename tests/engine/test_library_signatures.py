"""Our calls of FlashInfer and of PyTorch's varlen_attn fit what those libraries have, at the lowest
and the highest version that pyproject.toml allows: no CPU test calls the real ones.

The calls are recorded from our code and bound to signatures read from the libraries' sources.
Imported, FlashInfer's would say less: since 0.6.18 `plan` takes **kwargs and hands them on.
"""

import ast
import inspect
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from torch.nn.attention import varlen

from softgrpo_engine.execution import attention_backends
from softgrpo_engine.execution.attention_backends import HostBatch, attention_backend
from softgrpo_engine.model.attention import PagedAttention
from softgrpo_engine.scheduling.kv_cache import PAGE_SIZE
from softgrpo_engine.training import group_attention
from softgrpo_engine.training.group_attention import GroupAttention

sys.path.insert(0, str(Path(__file__).parent))
from wheel_sources import Unavailable, ends, source

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
# Where the wrappers are defined, and what `plan` must take our positional tables for.
FLASHINFER = {
    "BatchDecodeWithPagedKVCacheWrapper": (
        "flashinfer/decode.py",
        "indptr indices last_page_len num_qo_heads num_kv_heads head_dim page_size",
    ),
    "BatchPrefillWithPagedKVCacheWrapper": (
        "flashinfer/prefill.py",
        "qo_indptr paged_kv_indptr paged_kv_indices paged_kv_last_page_len num_qo_heads "
        "num_kv_heads head_dim_qk page_size",
    ),
}
VARLEN = "query key value cu_seq_q cu_seq_k max_q max_k"


@dataclass
class Call:
    """One call of ours: of which method or function, with which arguments."""

    name: str
    args: tuple
    options: dict

    def bind(self, functions):
        """The arguments by the names that the library has for them; raises TypeError where it has
        none. A method that only hands its options on is read in the one that takes them."""
        definition = functions.get(f"_{self.name}_impl", functions[self.name])
        signature = signature_of(definition.args)
        bound = signature.bind(*self.args, **self.options)
        for name in bound.arguments:
            kind = signature.parameters[name].kind
            assert "VAR" not in kind.name, f"{self.name}: not known what {name} takes"
        return bound.arguments


def signature_of(arguments):
    """inspect's signature of a definition that was read; its defaults are their source text."""
    kinds = inspect.Parameter
    positional = [(a.arg, kinds.POSITIONAL_ONLY) for a in arguments.posonlyargs]
    positional += [(a.arg, kinds.POSITIONAL_OR_KEYWORD) for a in arguments.args]
    required = len(positional) - len(arguments.defaults)
    defaults = [kinds.empty] * required + [ast.unparse(d) for d in arguments.defaults]
    found = [kinds(*p, default=d) for p, d in zip(positional, defaults, strict=True)]
    if arguments.vararg:
        found.append(kinds(arguments.vararg.arg, kinds.VAR_POSITIONAL))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        default = kinds.empty if default is None else ast.unparse(default)
        found.append(kinds(argument.arg, kinds.KEYWORD_ONLY, default=default))
    if arguments.kwarg:
        found.append(kinds(arguments.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(found)


def functions_of(text, of_class=None):
    """The functions of a module or class by name; of several @overloads the last is the one."""
    body = ast.parse(text).body
    if of_class is not None:
        (body,) = [n.body for n in body if isinstance(n, ast.ClassDef) and n.name == of_class]
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def exported(text):
    """What a module's __init__.py imports by name or lists in __all__."""
    nodes = list(ast.walk(ast.parse(text)))
    names = [a.asname or a.name for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names]
    return set(names + [n.value for n in nodes if isinstance(n, ast.Constant)])


def version(requirements, project, end):
    """The release at this end of our pin, or a skip that says why there is none to read."""
    pins = [r for r in map(Requirement, requirements) if r.name == project]
    try:
        return ends(pins[0])[end == "highest"]
    except Unavailable as reason:
        pytest.skip(f"{project} was not checked: {reason}")


@pytest.fixture(params=["lowest", "highest"])
def torch_version(request):
    return version(PROJECT["dependencies"], "torch", request.param)


@pytest.fixture(params=["lowest", "highest"])
def flashinfer_version(request):
    return version(PROJECT["optional-dependencies"]["cuda"], "flashinfer-python", request.param)


@pytest.fixture
def tell(capsys):
    """Says what was checked, in a run that passes too: it hangs on the index of the day."""

    def say(what):
        with capsys.disabled():
            print(f"\n{what}")

    return say


def recorder(calls):
    class Wrapper:
        def __init__(self, *args, **options):
            calls.append(Call("__init__", (self, *args), options))

        def plan(self, *args, **options):
            calls.append(Call("plan", (self, *args), options))

        def run(self, *args, **options):
            calls.append(Call("run", (self, *args), options))

    return Wrapper


def paged_batch(rows):
    """Two sequences of 17 and 5 tokens as the host knows them, and what an Attend is given."""
    table = np.array([[1, 2], [3, 0]], dtype=np.int32)
    lens = np.array([17, 5], dtype=np.int32)
    starts = None if rows is None else np.array([0, *np.cumsum(rows)], dtype=np.int32)
    pages = torch.zeros(4, KV_HEADS, PAGE_SIZE, HEAD_DIM)
    device = PagedAttention(
        pages[None], pages[None], torch.zeros(0, dtype=torch.int64), torch.from_numpy(table),
        torch.from_numpy(lens), None if starts is None else torch.from_numpy(starts), HEADS,
    )  # fmt: skip
    q = torch.zeros(2 if rows is None else sum(rows), HEADS, HEAD_DIM)
    return HostBatch(table, lens, starts), (device, q, pages, pages)


@pytest.fixture
def flashinfer_calls(monkeypatch):
    """Our calls of each wrapper: construction, and plan and run of decoding and of prompts."""
    calls = {name: [] for name in FLASHINFER}
    library = SimpleNamespace(**{name: recorder(into) for name, into in calls.items()})
    monkeypatch.setitem(sys.modules, "flashinfer", library)
    monkeypatch.setattr(attention_backends, "_check_gpu", lambda *_: None)
    config = SimpleNamespace(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    backend = attention_backend("flashinfer", config, torch.bfloat16, torch.device("cpu"))
    for rows in (None, [12, 5]):
        host, batch = paged_batch(rows)
        backend.plan(host)(*batch)
    return calls


@pytest.fixture
def varlen_calls(monkeypatch):
    """Our calls: of the trainer over packed groups, of the engine over pages."""
    calls = []

    def record(*args, **options):
        calls.append(Call("varlen_attn", args, options))
        return torch.zeros_like(args[0])

    def without_kernels(qkv, cos, sin, starts, copies, *heads):
        sizes = zip((len(qkv), len(copies), len(copies)), (*heads, heads[1]), strict=True)
        return [qkv.new_empty(*size, HEAD_DIM) for size in sizes]

    monkeypatch.setattr(varlen, "varlen_attn", record)
    monkeypatch.setattr(group_attention, "rotate_heads", without_kernels)
    attention = GroupAttention([3], [[2, 4]], HEADS, KV_HEADS, device="meta")
    rope = (torch.zeros(9, HEAD_DIM, device="meta"),) * 2
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    attention(0, torch.zeros(9, width, dtype=torch.bfloat16, device="meta"), rope)
    for rows in (None, [12, 5]):
        _, batch = paged_batch(rows)
        attention_backends._attend_by_varlen(12, *batch)
    return calls


def test_flashinfer_has_what_we_call(flashinfer_version, flashinfer_calls, tell):
    project = "flashinfer-python"
    exports = exported(source(project, flashinfer_version, "flashinfer/__init__.py"))
    for name, (path, tables) in FLASHINFER.items():
        assert name in exports
        functions = functions_of(source(project, flashinfer_version, path), name)
        bound = {call.name: list(call.bind(functions)) for call in flashinfer_calls[name]}
        assert bound["__init__"][:3] == ["self", "float_workspace_buffer", "kv_layout"]
        assert bound["plan"][1 : 1 + len(tables.split())] == tables.split()
        assert bound["run"] == ["self", "q", "paged_kv_cache"]
    tell(f"{project} {flashinfer_version}: both wrappers take our calls")


def test_varlen_attn_has_what_we_call(torch_version, varlen_calls, tell):
    functions = functions_of(source("torch", torch_version, "torch/nn/attention/varlen.py"))
    assert len(varlen_calls) == 3
    for call in varlen_calls:
        names = list(call.bind(functions))
        assert names[:7] == VARLEN.split()
    exports = exported(source("torch", torch_version, "torch/nn/attention/__init__.py"))
    assert {"activate_flash_attention_impl", "current_flash_attention_impl"} <= exports
    tell(f"torch {torch_version}: varlen_attn takes our calls of trainer and engine")


FORWARDS = """
def plan(self, indptr, *rest, **options): ...
def _plan_impl(self, indptr, *, causal=False): ...
"""


@pytest.mark.parametrize(
    ("text", "args", "options", "message"),
    [
        ("def plan(self, indptr, causal): ...", (1, 2), {}, None),
        ("def plan(self, indptr, *, causal): ...", (1, 2), {}, "too many positional"),
        ("def plan(self, indptr): ...", (1,), {"causal": True}, "unexpected keyword"),
        ("def plan(self, indptr, causal=1): ...", (), {}, "missing a required"),
        (FORWARDS, (1,), {"causal": True}, None),
        (FORWARDS, (1,), {"fixed": 3}, "unexpected keyword"),
    ],
)
def test_a_call_that_does_not_fit_is_found(text, args, options, message):
    call = Call("plan", (None, *args), options)
    if message is None:
        assert list(call.bind(functions_of(text))) == ["self", "indptr", "causal"]
    else:
        with pytest.raises(TypeError, match=message):
            call.bind(functions_of(text))


def test_options_that_vanish_in_kwargs_are_no_proof():
    with pytest.raises(AssertionError, match="not known what options takes"):
        Call("run", (), {"scale": 1}).bind(functions_of("def run(**options): ..."))
