"""torch.cuda over the simulated device: what a CPU build has no functions for."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch.cuda._utils import _get_device_index

if TYPE_CHECKING:
    from simulated_gpu.device import Device

TOTAL_MEMORY = 80 << 30
NAME = "Simulated H100"


@contextlib.contextmanager
def patched(device: Device, count: int) -> Iterator[None]:
    """torch.cuda finds ``count`` devices."""
    core = device.core
    pools = _Pools(core)

    def index_of(where: Any = None) -> int:
        if where is None:
            return core.device()
        return where if isinstance(where, int) else torch.device(where).index or 0

    def free_and_total(where: Any = None) -> tuple[int, int]:
        return TOTAL_MEMORY - core.memory()[0], TOTAL_MEMORY

    def set_sync_debug_mode(mode: int | str) -> None:
        device.sync_debug_mode = {0: "default", 1: "warn", 2: "error"}.get(mode, mode)  # type: ignore[call-overload]

    class StreamOf(Stream):
        owner = device

    class EventOf(Event):
        owner = device

    class GraphOf(Graph):
        owner, memory = device, pools

    default = StreamOf()
    current = [default]
    properties = SimpleNamespace(
        name=NAME, major=9, minor=0, total_memory=TOTAL_MEMORY, multi_processor_count=132,
        max_threads_per_multi_processor=2048, warp_size=32, L2_cache_size=50 << 20,
        shared_memory_per_block_optin=232448, gcnArchName="",
    )  # fmt: skip
    values: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: count,
        "current_device": core.device,
        "set_device": lambda where: core.set_device(_get_device_index(where)),
        "is_initialized": lambda: True,
        "init": _nothing,
        "_lazy_init": _nothing,
        "_is_in_bad_fork": lambda: False,
        "get_device_name": lambda where=None: NAME,
        "get_device_capability": lambda where=None: (9, 0),
        "get_device_properties": lambda where=None: properties,
        "get_arch_list": lambda: ["sm_90"],
        "is_bf16_supported": lambda *_, **__: True,
        "can_device_access_peer": lambda *_: True,
        "synchronize": lambda where=None: device.wait("cuda.synchronize"),
        "mem_get_info": free_and_total,
        "memory_allocated": lambda where=None: core.memory()[0],
        "max_memory_allocated": lambda where=None: core.memory()[1],
        "memory_reserved": lambda where=None: core.memory()[0],
        "max_memory_reserved": lambda where=None: core.memory()[1],
        "reset_peak_memory_stats": lambda where=None: core.reset_peak(),
        "empty_cache": pools.empty_cache,
        "ipc_collect": _nothing,
        "manual_seed": _nothing,
        "manual_seed_all": _nothing,
        "get_rng_state": lambda where=None: torch.get_rng_state(),
        "set_rng_state": lambda state, where=None: torch.set_rng_state(state),
        "Stream": StreamOf,
        "Event": EventOf,
        "CUDAGraph": GraphOf,
        "current_stream": lambda where=None: current[0],
        "default_stream": lambda where=None: default,
        "set_stream": lambda stream: current.__setitem__(0, stream),
        "graph_pool_handle": pools.handle,
        "is_current_stream_capturing": core.is_capturing,
        "set_sync_debug_mode": set_sync_debug_mode,
        "get_sync_debug_mode": lambda: ["default", "warn", "error"].index(device.sync_debug_mode),
        "device": _device_guard(core, index_of),
        "_get_device": lambda where=None: torch.device("cuda", index_of(where)),
    }
    graphs = {"is_current_stream_capturing": core.is_capturing, "CUDAGraph": GraphOf}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, create=True, **values))
        stack.enter_context(mock.patch.multiple(torch.cuda.graphs, create=True, **graphs))
        stack.enter_context(mock.patch.object(torch.cuda.graph, "default_capture_stream", None))
        stack.enter_context(mock.patch.object(torch._C, "_host_emptyCache", _nothing, create=True))
        storage = {"__new__": _new_storage, "resize_": _resizing(core)}
        for name, method in storage.items():
            stack.enter_context(mock.patch.object(torch.UntypedStorage, name, method))
        yield


_STORAGE = torch.UntypedStorage.__new__


def _new_storage(cls: type, *args: Any, device: Any = None, **options: Any) -> Any:
    """A CPU build makes no storage for this device (a copied or unpickled tensor asks for one)."""
    if device is None or torch.device(device).type != "cuda":
        return _STORAGE(cls, *args, device=device, **options)
    return torch.empty(*args, dtype=torch.uint8, device=device).untyped_storage()


def _resizing(core: Any) -> Any:
    resize = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        if storage.device.type != "cuda":
            return resize(storage, size)
        core.resize_storage(torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage), size)
        return storage

    return resize_


def _nothing(*_: Any, **__: Any) -> None: ...


def _device_guard(core: Any, index_of: Any) -> type:
    class device:
        def __init__(self, where: Any = None) -> None:
            self.index = index_of(where)

        def __enter__(self) -> None:
            self.before = core.device()
            if self.index >= 0:
                core.set_device(self.index)

        def __exit__(self, *_: object) -> None:
            core.set_device(self.before)

    return device


class Stream(torch.Stream):
    """All streams are one: work is done in the order in which it was put there."""

    owner: Device

    def __new__(cls, device: Any = None, priority: int = 0, **_: Any) -> Stream:
        index = cls.owner.core.device() if device is None else torch.device(device).index
        return super().__new__(cls, torch.device("cuda", index or 0))

    def wait_stream(self, other: Stream) -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        event = event or torch.cuda.Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.owner.wait("stream.synchronize")

    def query(self) -> bool:
        return True

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None: ...


class Event:
    """A place in the stream; who waits for it waits for nothing that came after."""

    owner: Device

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self._order: int | None = None

    def record(self, stream: Stream | None = None) -> None:
        self._order = self.owner.core.order()

    def wait(self, stream: Stream | None = None) -> None: ...

    def synchronize(self) -> None:
        self.owner.core.not_in_capture("event.synchronize")
        if self._order is not None:
            self.owner.note("event.synchronize")
            self.owner.core.flush(self._order)

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 0.0


class _Pools:
    """Memory of graphs. PyTorch counts who has captured into a pool; one whose graphs are all gone
    is dead until empty_cache finds none of its memory held (create_or_incref_pool)."""

    # Of the process, not of a device: what an earlier test still holds is in no pool of this one.
    _numbers = itertools.count(1)

    def __init__(self, core: Any) -> None:
        self._core = core
        self._users: dict[Any, int] = {}

    def handle(self) -> tuple[int, int]:
        return (0, next(self._numbers))

    def enter(self, pool: Any) -> None:
        if self._users.get(pool) == 0:
            raise RuntimeError(
                "it->second->use_count > 0 INTERNAL ASSERT FAILED: captured into a pool whose "
                "graphs are all gone"
            )
        self._users[pool] = self._users.get(pool, 0) + 1

    def leave(self, pool: Any) -> None:
        self._users[pool] -= 1

    def empty_cache(self) -> None:
        held = self._core.pools_in_use()
        self._users = {p: n for p, n in self._users.items() if n or p[1] in held}


class Graph:
    """torch.cuda.CUDAGraph."""

    owner: Device
    memory: _Pools

    def __init__(self, keep_graph: bool = False) -> None:
        self._pool: Any = None
        self._core: Any = None

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global", **_: Any) -> None:
        pool = pool or self.memory.handle()
        self.memory.enter(pool)
        self._pool, self._core = pool, self.owner.core.Graph()
        self._core.begin(pool[1], capture_error_mode == "global")

    def capture_end(self) -> None:
        self._core.end()

    def replay(self) -> None:
        if self._core is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        self._core.replay()

    def __len__(self) -> int:
        return 0 if self._core is None else self._core.length

    def reset(self) -> None:
        if self._pool is not None:
            self.memory.leave(self._pool)
        self._pool = self._core = None

    def pool(self) -> Any:
        return self._pool

    def __del__(self) -> None:
        self.reset()
