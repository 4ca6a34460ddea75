"""Graphs of the simulated device, and kernels in them."""

import threading

import pytest
import torch
from torch import nn

from simulated_gpu.host_waits import WAITS


def captured(run, graph=None, **options):
    graph = graph or torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, **options):
        result = run()
    return graph, result


def test_a_capture_computes_nothing_and_a_replay_computes_in_the_same_memory(x):
    total = torch.zeros(4, device="cuda")

    def step():
        result = 2 * x
        total.add_(result)
        return result

    graph, result = captured(step)
    assert total.tolist() == [0] * 4
    assert result.isnan().all()  # poison until the replay
    place = result.data_ptr()
    graph.replay()
    x.fill_(1.0)
    graph.replay()
    assert result.data_ptr() == place
    assert result.tolist() == [2] * 4
    assert total.tolist() == [2, 4, 6, 8]


FORBIDDEN = {
    name: WAITS[name]
    for name in ("item", "nonzero", "x[mask]", "x[rows] = number", "from a list", "cpu", "event")
}
FORBIDDEN["pageable"] = WAITS["from pageable memory"]
FORBIDDEN["synchronize"] = WAITS["synchronize"]


@pytest.mark.parametrize("case", FORBIDDEN)
def test_what_must_not_be_captured(x, case):
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        FORBIDDEN[case](x)
    with pytest.raises(RuntimeError, match="previous error during capture"):
        graph.capture_end()


def test_a_pinned_copy_is_captured(x):
    host = torch.ones(4).pin_memory()
    graph, _ = captured(lambda: x.copy_(host, non_blocking=True))
    host.fill_(3.0)
    graph.replay()
    assert x.tolist() == [3] * 4


def test_a_graph_is_captured_before_it_is_replayed(simulated_gpu):
    with pytest.raises(RuntimeError, match="without a preceding successful capture"):
        torch.cuda.CUDAGraph().replay()


def test_no_capture_into_a_pool_whose_graphs_are_gone_while_its_memory_is_held(x):
    pool = torch.cuda.graph_pool_handle()
    graph, result = captured(lambda: 2 * x, pool=pool)
    captured(lambda: x + 1, pool=pool)  # while a graph lives
    del graph
    with pytest.raises(RuntimeError, match="use_count > 0"):
        captured(lambda: 2 * x, pool=pool)
    captured(lambda: 2 * x, pool=torch.cuda.graph_pool_handle())
    del result
    captured(lambda: 2 * x, pool=pool)  # empty_cache took the memory back


@pytest.mark.parametrize("mode", ["global", "thread_local"])
def test_a_call_of_another_thread_breaks_a_global_capture(x, mode):
    failures = []

    def elsewhere():
        try:
            x.sum().item()
        except RuntimeError as error:
            failures.append(str(error))

    def step():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return 2 * x

    if mode == "global":
        with pytest.raises(RuntimeError, match="previous error during capture"):
            captured(step)
        assert "not permitted" in failures[0]
    else:
        graph, result = captured(step, capture_error_mode=mode)
        assert failures == []
        graph.replay()
        assert result.tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("kernels", ["stand-ins", "interpreter"])
def test_a_captured_kernel_is_launched_again(x, kernels, monkeypatch, simulated_gpu):
    from softgrpo_engine.ops.gpu import silu_mul

    monkeypatch.setenv("SOFTGRPO_KERNELS", kernels)
    x = x.view(1, 4)
    expected = nn.functional.silu(x[:, :2]) * x[:, 2:]
    torch.testing.assert_close(silu_mul(x), expected)
    graph, out = captured(lambda: silu_mul(x))
    assert out.isnan().all()
    with simulated_gpu.counting() as counts:
        graph.replay()
    assert counts.launches == {"graph": 1}
    torch.testing.assert_close(out, expected)
