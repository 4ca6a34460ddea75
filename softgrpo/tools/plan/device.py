"""A GPU that has sizes and no numbers: what a program holds on it, and how much it computes.

Tensors on it are PyTorch's fake tensors: shapes, dtypes and lifetimes are real, there is no memory
behind them. The program runs as it does on a GPU: FSDP, autograd and the optimizer are PyTorch's
own, Triton kernels are launched and do nothing. Tensors of the CPU stay real.

It needs no GPU. A build of PyTorch without CUDA has no device guard of it, which autograd asks for
in C++: there a fake tensor says that it is on `meta:1`.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.fsdp._fully_shard import _fsdp_init
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import flop_registry

from softgrpo.config import ConfigError

DEVICE = torch.device("cuda", 0)
_IN_CPP = torch.device("meta", 1)
_ENDLESS = 2**60
_BLOCK = 512  # PyTorch's allocator rounds to it

Place = tuple[str, str]  # phase of the run, part of the model


class FakeGPU(TorchDispatchMode):
    """While it is entered, `torch.cuda` finds one GPU, this one.

    It is as large as one likes. held: bytes in use. place: what the program is doing, set from
    outside. peaks: for every place the most bytes that were in use there. flops: operations of
    matrix products by phase; attention is not among them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        self.place: Place = ("", "")
        self.peaks: dict[Place, int] = defaultdict(int)
        self.flops: dict[str, float] = defaultdict(float)
        self._sizes: dict[int, int] = {}  # of storages
        self._fake = _FakeMode(allow_non_fake_inputs=True)

    def enter_place(self, phase: str, part: str = "") -> None:
        """What is in use belongs to the peak of the new place, too."""
        self.place = (phase, part)
        self._note_peak()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if active_fake_mode() is not None:  # DTensor works out a shape
            return func(*args, **(kwargs or {}))
        if DTensor in types:  # first to its local tensors, which come here
            return NotImplemented
        if func is torch.ops.prim.device.default:
            return _IN_CPP
        values, spec = tree_flatten((args, kwargs or {}))
        values = [DEVICE if isinstance(x, torch.device) and x == _IN_CPP else x for x in values]
        if not any(isinstance(x, FakeTensor) or _is_gpu(x) for x in values):
            return _on_host(func, *tree_unflatten(values, spec))
        if func.namespace == "softgrpo_kernels":  # a GPU runs it, not what stands for it
            with self._again():
                return func.redispatch(_KERNEL, *args, **(kwargs or {}))
        return self._on_device(func, values, spec)

    @contextlib.contextmanager
    def _again(self) -> Iterator[None]:
        """Operators that an operator calls come here, too."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    def _on_device(self, func: Any, values: list[Any], spec: Any) -> Any:
        aten = torch.ops.aten
        args, kwargs = tree_unflatten(values, spec)
        if func is aten._local_scalar_dense.default:  # a number is read: any will do
            return 1.0 if args[0].is_floating_point() else 1
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            return args[0].zero_()
        if func is aten.add_.Tensor and args[1].layout is torch.sparse_coo:
            return args[0]
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]
        if any(isinstance(x, Tensor) and not isinstance(x, FakeTensor) for x in values):
            args, kwargs = tree_unflatten([self._faked(x) for x in values], spec)
        with self._fake:
            out = func(*args, **kwargs)
        # A parameter that is remembered cannot be exchanged (Module.to).
        self._fake.fake_tensor_converter.meta_converter.tensor_memo.clear()
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device == DEVICE:
                self._count(tensor)
        workspace = _workspace(func, args)
        self._note_peak(workspace)
        if (formula := flop_registry.get(func.overloadpacket)) and func.overloadpacket in _PRODUCTS:
            self.flops[self.place[0]] += formula(*args, **kwargs, out_val=out)
        return out

    def _faked(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            return value
        # Of another object each time: what it is remembered by may not outlive this.
        return self._fake.from_tensor(value.detach())

    def _count(self, tensor: Tensor) -> None:
        if tensor.layout is torch.sparse_coo:
            with self._fake:
                tensor = tensor._values()
        self.count_storage(tensor.untyped_storage())

    def count_storage(self, storage: torch.UntypedStorage) -> None:
        """Notes the size of a storage, new or changed, until it is gone."""
        key = storage._cdata
        if key not in self._sizes:
            weakref.finalize(storage, self._drop, key)
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self.held += size - self._sizes.get(key, 0)
        self._sizes[key] = size

    def is_counted(self, storage: torch.UntypedStorage) -> bool:
        return storage._cdata in self._sizes

    def _drop(self, key: int) -> None:
        self.held -= self._sizes.pop(key)

    def _note_peak(self, workspace: int = 0) -> None:
        self.peaks[self.place] = max(self.peaks[self.place], self.held + workspace)

    def __enter__(self) -> FakeGPU:
        self._patches = contextlib.ExitStack()
        self._patches.enter_context(_visible(self))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()


class _FakeMode(FakeTensorMode):
    """Never looks for a real device."""

    @property
    def avoid_device_init(self) -> bool:
        return True


_KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)  # of all back ends, really
_aten = torch.ops.aten
_PRODUCTS = {_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm}


def _is_gpu(value: Any) -> bool:
    if isinstance(value, str):
        return value == "cuda"
    return isinstance(value, torch.device) and value.type == "cuda"


def _on_host(func: Any, args: Any, kwargs: Any) -> Any:
    if kwargs.get("pin_memory"):
        kwargs = kwargs | {"pin_memory": False}
    return func(*args, **kwargs)


def _workspace(func: Any, args: Any) -> int:
    """Bytes that a CUDA kernel takes for itself while it runs, where that is much: the backward
    pass of flash attention sums dq in float32, and dk and dv for every query head."""
    if not str(func).startswith("torch_attn._varlen_attn_backward"):
        return 0
    q, k = args[1], args[2]
    heads, width = q.shape[1], q.shape[2]
    own = k.shape[1] != heads
    return int(4 * q.numel() + own * 2 * k.element_size() * k.shape[0] * heads * width)


class _Stream:
    """Of a device whose work is done at once."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: _Stream()


_IGNORED = (
    "_lazy_init", "set_device", "synchronize", "empty_cache", "get_rng_state", "set_rng_state",
    "manual_seed_all",
)  # fmt: skip


def _nothing(*_: Any, **__: Any) -> None: ...


@contextlib.contextmanager
def _visible(gpu: FakeGPU) -> Iterator[None]:
    """PyTorch and Triton as on a machine with this GPU."""
    try:
        from triton.runtime.jit import KernelInterface
    except ImportError:
        raise ConfigError(
            "--plan runs the program of a GPU, whose kernels are Triton's: pip install triton"
        ) from None
    cuda: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda _=None: (9, 0),
        "mem_get_info": lambda _=None: (_ENDLESS, _ENDLESS),
        "is_current_stream_capturing": lambda: False,
        "current_stream": _Stream,
        "stream": _Stream,
        "Stream": _Stream,
        "Event": _Stream,
    } | dict.fromkeys(_IGNORED, _nothing)
    resize = torch.UntypedStorage.resize_
    move: Any = Tensor.to
    address = torch.UntypedStorage.data_ptr
    real_device = Tensor.device.__get__

    def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        resize(storage, size)
        if gpu.is_counted(storage):
            gpu.count_storage(storage)
            gpu.enter_place(*gpu.place)
        return storage

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # In C++ a device without its number is asked for it, and a build without CUDA has none.
        named = [DEVICE if _is_gpu(x) else x for x in args]
        options = {k: DEVICE if _is_gpu(x) else x for k, x in kwargs.items()}
        moved: Tensor = move(tensor, *named, **options)
        return moved

    def device_of(tensor: Tensor) -> torch.device:
        device: torch.device = real_device(tensor)
        return DEVICE if device == _IN_CPP else device

    def storage_address(storage: torch.UntypedStorage) -> int:
        return storage._cdata if gpu.is_counted(storage) else address(storage)

    def tensor_address(tensor: Tensor) -> int:
        offset = int(tensor.storage_offset()) * tensor.element_size()
        return storage_address(tensor.untyped_storage()) + offset

    is_cuda = property(lambda tensor: tensor.device.type == "cuda")
    is_meta = property(lambda tensor: tensor.device.type == "meta")
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context
        patch(mock.patch.multiple(torch.cuda, create=True, **cuda))
        patch(mock.patch.object(torch.UntypedStorage, "resize_", resize_))
        patch(mock.patch.object(Tensor, "to", to))
        patch(mock.patch.object(Tensor, "pin_memory", lambda tensor, *_: tensor))
        patch(mock.patch.object(DTensor, "device", property(device_of), create=True))
        for kind in (FakeTensor, DTensor):
            patch(mock.patch.multiple(kind, create=True, is_cuda=is_cuda, is_meta=is_meta))
        patch(mock.patch.object(FakeTensor, "data_ptr", tensor_address, create=True))
        patch(mock.patch.object(torch.UntypedStorage, "data_ptr", storage_address))
        launch = lambda kernel, grid: _nothing  # noqa: E731
        # FSDP moves a parameter by exchanging it, as it does for kinds of tensors made in Python.
        # A Mock would keep the tensors that it is called with.
        exchanged = lambda tensor: True  # noqa: E731
        patch(mock.patch.object(_fsdp_init, "is_traceable_wrapper_subclass", exchanged))
        patch(mock.patch.object(KernelInterface, "__getitem__", launch))
        yield
