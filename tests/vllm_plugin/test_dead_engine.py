"""vLLM's process may end at any time: whoever waits for it learns so, in one line."""

import queue
from concurrent.futures import Future
from types import SimpleNamespace

import pytest


def test_who_waits_for_a_dead_engine_is_told():
    from vllm.v1.engine.exceptions import EngineDeadError

    from softgrpo_vllm.alive import EngineLost, asking, watch

    call, resources = Future(), SimpleNamespace(engine_dead=False)
    client = SimpleNamespace(
        resources=resources, outputs_queue=queue.Queue(), utility_results={1: call}
    )
    watch(client)
    assert not call.done()
    resources.engine_dead = True
    with pytest.raises(EngineLost, match="vLLM's process has died: see what it printed"), asking():
        call.result(timeout=10)
    assert isinstance(client.outputs_queue.get(timeout=10), EngineDeadError)
