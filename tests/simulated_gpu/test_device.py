"""The rules of the simulated device: each has a test that fails when the rule is taken out."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn

from simulated_gpu import flash, found

HERE = "tests/simulated_gpu/test_device.py"


@pytest.fixture
def x(simulated_gpu):
    return torch.arange(4.0, device="cuda")


def cuda(*values, **options):
    return torch.tensor(values, device="cuda", **options)


def captured(run, graph=None, **options):
    graph = graph or torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, **options):
        result = run()
    return graph, result


# ---- tensors ---------------------------------------------------------------------------------


def test_tensors_are_of_cuda_and_hold_values(x):
    assert x.is_cuda
    assert x.device == torch.device("cuda", 0)
    assert not x.is_cpu
    assert (2 * x + 1).tolist() == [1, 3, 5, 7]
    assert x.to(torch.bfloat16).sum().item() == 6
    assert x.view(2, 2).T.contiguous().flatten().tolist() == [0, 2, 1, 3]
    x[1:3] = 9
    assert x.cpu().tolist() == [0, 9, 9, 3]
    assert "device='cuda:0'" in repr(x)
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        x.numpy()


def test_views_of_ordinary_tensors_are_ordinary_in_inference_mode(x):
    with torch.inference_mode():
        x[:2].fill_(7.0)
        assert not x.view(2, 2).is_inference()
        assert (x + 1).is_inference()
    assert x.requires_grad_().sum().item() == 19


def test_results_may_change_their_size(x):
    out = torch.empty(0, device="cuda")
    torch.add(x, 1, out=out)
    assert out.tolist() == [1, 2, 3, 4]


def test_copies_keep_the_device(x):
    assert copy.deepcopy(x).device == x.device
    assert copy.deepcopy(nn.Linear(2, 2).to("cuda")).weight.is_cuda


def test_only_while_it_is_visible(simulated_gpu):
    assert torch.cuda.is_available()
    assert torch.cuda.device_count() == 1
    assert torch.accelerator.current_accelerator() == torch.device("cuda")
    assert "H100" in torch.cuda.get_device_name()


def test_nobody_sees_it_otherwise():
    if found.SIMULATED is None:
        pytest.skip(str(found.WHY_NOT))
    assert not torch.cuda.is_available()
    assert torch.accelerator.current_accelerator() is None
    with pytest.raises((RuntimeError, AssertionError)):
        torch.empty(1, pin_memory=True)


# ---- devices that meet -----------------------------------------------------------------------

CHECKED = "Expected all tensors to be on the same device, but got .* is on c.*, different from"
ITERATED = "Expected all tensors to be on the same device, but found at least two devices, cuda:0"
INDICES = "indices should be either on cpu or on the same device as the indexed tensor"
MIXED = {
    "add": (lambda x: x + torch.ones(4), ITERATED),
    "where": (lambda x: torch.where(x > 0, x, torch.ones(4)), ITERATED),
    "in place": (lambda x: torch.ones(4).mul_(x), ITERATED),
    "into a number": (lambda x: torch.tensor(1.0).add_(x.sum()), ITERATED),
    "mm": (lambda x: torch.ones(1, 4) @ x[:, None], CHECKED),
    "cat": (lambda x: torch.cat([x, torch.ones(1)]), CHECKED),
    "gather": (lambda x: x.gather(0, torch.tensor([0])), CHECKED),
    "index_select": (lambda x: x.index_select(0, torch.tensor([0])), CHECKED),
    "index_add": (lambda x: x.index_add(0, torch.tensor([0]), x[:1]), "same device"),
    "embedding": (lambda x: nn.functional.embedding(torch.tensor([0]), x[:, None]), CHECKED),
    "number of no dimension": (lambda x: torch.cat([x, torch.ones(1)[0:1]]), CHECKED),
    "cpu[cuda]": (lambda x: torch.ones(4)[cuda(0)], INDICES),
    "cpu[rows] = cuda": (lambda x: torch.ones(4).__setitem__(torch.tensor([0]), x[:1]), ITERATED),
    "cuda[rows] = cpu": (lambda x: x.__setitem__(cuda(0, 1), torch.ones(2)), ITERATED),
}


@pytest.mark.parametrize("case", MIXED)
def test_mixed_devices_are_refused_in_pytorch_s_words(x, case):
    run, words = MIXED[case]
    with pytest.raises(RuntimeError, match=words):
        run(x)


def test_a_gradient_of_another_device_is_refused(x):
    with pytest.raises(RuntimeError, match="device"):
        (2 * x.requires_grad_()).backward(torch.ones(4))


def test_what_pytorch_lets_meet(x):
    assert (x * torch.tensor(2.0)).tolist() == [0, 2, 4, 6]
    assert torch.where(x > 1, 1.0, torch.tensor(0.0)).tolist() == [0, 0, 1, 1]
    assert x[torch.tensor([3])].tolist() == [3]
    x[torch.tensor([0])] = 5.0
    x[1:] = torch.ones(3)
    assert x.tolist() == [5, 1, 1, 1]
    assert torch.zeros(4).copy_(x).tolist() == [5, 1, 1, 1]


def test_two_gpus_do_not_meet():
    if found.SIMULATED is None:
        pytest.skip(str(found.WHY_NOT))
    with found.SIMULATED.visible(2):
        there = torch.ones(2, device="cuda:1")
        # What another process pickled comes back on the number of its device.
        sent = pickle.loads(pickle.dumps(there))
        assert sent.device == torch.device("cuda", 1)
        with pytest.raises(RuntimeError, match=CHECKED):
            torch.cat([torch.ones(2, device="cuda:0"), sent])
        torch.cuda.set_device(1)
        assert torch.ones(1, device="cuda").device.index == 1


# ---- waits -----------------------------------------------------------------------------------

WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 1).any()),
    "float": lambda x: float(x[0]),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "from a list": lambda x: torch.tensor([1.0], device="cuda"),
    "from the host": lambda x: torch.ones(4).to("cuda"),
    "from pageable memory": lambda x: torch.ones(4).to("cuda", non_blocking=True),
    "nonzero": lambda x: x.nonzero(),
    "x[mask]": lambda x: x[x > 1],
    "x[mask] = tensor": lambda x: x.__setitem__(x > 1, torch.ones_like(x)[:2]),
    "x[rows] = number": lambda x: x.__setitem__(x.long(), 0.0),
    "x[0] = number": lambda x: x.__setitem__(0, 1.0),
    "x[cpu rows]": lambda x: x[torch.tensor([1])],
    "masked_select": lambda x: x.masked_select(x > 1),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "repeat_interleave": lambda x: torch.repeat_interleave(x, x.long()),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "stream": lambda x: torch.cuda.current_stream().synchronize(),
    "event": lambda x: torch.cuda.current_stream().record_event().synchronize(),
    "pickle": lambda x: pickle.dumps(x),
}


@pytest.mark.parametrize("case", WAITS)
def test_a_wait_is_counted_with_its_line(x, simulated_gpu, case):
    with simulated_gpu.counting() as counts:
        WAITS[case](x)
    assert counts.waits.total() >= 1
    assert all(line.startswith(f"{HERE}:") for _, line in counts.waits)
    torch.cuda.set_sync_debug_mode("error")
    if case != "event":
        with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
            WAITS[case](x)
    torch.cuda.set_sync_debug_mode("default")


NO_WAITS = {
    "arithmetic": lambda x: (x.softmax(0) @ x).sum(),
    "x[mask] = number": lambda x: x.__setitem__(x > 1, 0.0),
    "x[1:] = number": lambda x: x.__setitem__(slice(1, None), 0.0),
    "x[rows] = tensor": lambda x: x.__setitem__(x.long(), x + 1),
    "x[rows]": lambda x: x[x.long()],
    "fill": lambda x: x[0].fill_(1.0),
    "where": lambda x: torch.where(x > 1, x, 0.0),
    "full": lambda x: torch.full((3,), 2.0, device="cuda"),
    "arange": lambda x: torch.arange(3, device="cuda"),
    "repeat_interleave": lambda x: torch.repeat_interleave(x, x.long(), output_size=6),
    "pinned": lambda x: torch.ones(4).pin_memory().to("cuda", non_blocking=True),
    "sizes": lambda x: (x.shape, len(x), x.data_ptr(), x.is_contiguous()),
}


@pytest.mark.parametrize("case", NO_WAITS)
def test_nobody_waits_for_these(x, simulated_gpu, case):
    with simulated_gpu.counting() as counts:
        NO_WAITS[case](x)
    assert counts.waits.total() == 0, counts.table()


def test_a_wait_in_the_backward_pass_has_the_line_of_backward(x, simulated_gpu):
    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            grad.sum().item()
            return grad

    loss = Waits.apply(x.requires_grad_()).sum()
    with simulated_gpu.counting() as counts:
        loss.backward()
    ((why, line),) = counts.waits
    assert why == "item"
    assert line.startswith(HERE)


# ---- pinned memory ---------------------------------------------------------------------------


def test_pinned_memory_is_pinned(simulated_gpu):
    assert torch.empty(3, pin_memory=True).is_pinned()
    assert torch.ones(3).pin_memory().is_pinned()
    assert not torch.ones(3).is_pinned()
    with pytest.raises(RuntimeError, match="only dense CPU tensors can be pinned"):
        torch.ones(3, device="cuda").pin_memory()


def test_what_was_copied_to_pinned_memory_is_not_there_before_the_host_has_waited(x):
    host = torch.zeros(4, pin_memory=True)
    host.copy_(x, non_blocking=True)
    assert host.isnan().all()
    words = torch.zeros(4, dtype=torch.int64).pin_memory()
    words.copy_(x.long(), non_blocking=True)
    assert words.tolist() == [123] * 4
    torch.cuda.synchronize()
    assert host.tolist() == words.tolist() == [0, 1, 2, 3]


def test_an_event_waits_for_what_was_before_it(x):
    first, second = torch.zeros(4, pin_memory=True), torch.zeros(4, pin_memory=True)
    first.copy_(x, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    second.copy_(x, non_blocking=True)
    event.synchronize()
    assert first.tolist() == [0, 1, 2, 3]
    assert second.isnan().all()


def test_the_copy_is_of_the_moment_at_which_it_was_asked_for(x):
    host = torch.zeros(4, pin_memory=True)
    host.copy_(x, non_blocking=True)
    x.zero_()
    torch.cuda.synchronize()
    assert host.tolist() == [0, 1, 2, 3]


def test_pinned_memory_is_left_alone_while_a_copy_from_it_is_under_way(x):
    host = torch.ones(4).pin_memory()
    x.copy_(host, non_blocking=True)
    host.zero_()
    with pytest.raises(RuntimeError, match="pinned memory was written while a copy from it"):
        torch.cuda.synchronize()
    x.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    host.fill_(2.0)  # now it is free
    torch.cuda.synchronize()


# ---- graphs ----------------------------------------------------------------------------------


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


# ---- memory, autograd, optimizers ------------------------------------------------------------


def test_memory_is_counted(simulated_gpu):
    before, (free, total) = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()
    torch.cuda.reset_peak_memory_stats()
    block = torch.empty(1000, device="cuda")
    temporary = block + 1
    assert torch.cuda.memory_allocated() == before + 8000
    assert torch.cuda.mem_get_info() == (free - 8000, total)
    del temporary, block
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() == before + 8000
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == before


def train(device):
    torch.manual_seed(0)
    table = nn.Parameter(torch.randn(7, 6))
    model = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 5)).to(device)
    table = nn.Parameter(table.detach().to(device))
    optimizer = torch.optim.AdamW([table, *model.parameters()], lr=0.1, fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        table.grad = torch.zeros_like(table)
        ids = torch.arange(4, device=device)
        x = nn.functional.embedding(ids, table, sparse=True)
        x = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
        (x.log_softmax(-1)[:, 0].sum() / 4).neg().backward()
        nn.utils.clip_grad_norm_([table, *model.parameters()], 1.0)
        optimizer.step()
    assert next(iter(optimizer.state.values()))["step"].device.type == device
    return [p.detach().cpu() for p in (table, *model.parameters())]


def test_training_is_that_of_the_cpu(simulated_gpu):
    for ours, expected in zip(train("cuda"), train("cpu"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_a_gradient_lies_where_its_weight_does(x):
    weight = nn.Parameter(x.clone())
    with pytest.raises(RuntimeError, match=r"different type|device"):
        weight.grad = torch.ones(4)


# ---- kernels ---------------------------------------------------------------------------------


def test_triton_takes_device_pointers_alone(x):
    from softgrpo_kernels.gpu.decoder import silu_mul_kernel

    out = torch.empty(1, 2, device="cuda")
    with pytest.raises(ValueError, match=r"Pointer argument \(at 1\) cannot be accessed"):
        silu_mul_kernel[(1, 1)](out, torch.ones(1, 4), 2, BLOCK_I=16)
    with pytest.raises(RuntimeError, match="invalid argument"):
        silu_mul_kernel[(0, 1)](out, x, 2, BLOCK_I=16)


@pytest.mark.parametrize("kernels", ["stand-ins", "interpreter"])
def test_a_captured_kernel_is_launched_again(x, kernels, monkeypatch, simulated_gpu):
    from softgrpo_kernels.gpu import silu_mul

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


FLASH = {
    "float32": (torch.float32, torch.int32, 8, "only support fp16 and bf16"),
    "int64 starts": (torch.bfloat16, torch.int64, 8, "must have dtype int32"),
    "odd heads": (torch.bfloat16, torch.int32, 12, "multiples of 8"),
}


@pytest.mark.parametrize("case", FLASH)
def test_flash_attention_has_its_limits(simulated_gpu, case):
    dtype, index, size, words = FLASH[case]
    q = torch.randn(5, 2, size, device="cuda", dtype=dtype)
    starts = cuda(0, 2, 5, dtype=index)
    with pytest.raises(RuntimeError, match=words):
        varlen_attn(q, q, q, starts, starts, 3, 3, window_size=(-1, 0))


def test_flash_attention_takes_no_small_pages(simulated_gpu, monkeypatch):
    q = torch.randn(1, 2, 8, device="cuda", dtype=torch.bfloat16)
    pages = torch.randn(3, 16, 2, 8, device="cuda", dtype=torch.bfloat16)
    table, used = cuda([0, 1], dtype=torch.int32), cuda(20, dtype=torch.int32)

    def attend():
        return varlen_attn(
            q, pages, pages, cuda(0, 1, dtype=torch.int32), None, 1, 32,
            seqused_k=used, block_table=table,
        )  # fmt: skip

    with pytest.raises(RuntimeError, match="divisible by 256"):
        attend()
    monkeypatch.setattr(flash.Rules, "paged_by_any_size", True)
    assert attend().shape == q.shape


def test_flash_attention_is_attention(simulated_gpu):
    torch.manual_seed(0)
    q, k, v = (torch.randn(5, h, 8, dtype=torch.bfloat16) for h in (4, 2, 2))
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    results = []
    for device in ("cuda", "cpu"):
        leaves = [t.to(device).requires_grad_() for t in (q, k, v)]
        if device == "cuda":
            at = starts.to(device)
            out = varlen_attn(*leaves, at, at, 3, 3, window_size=(-1, 0), enable_gqa=True)
        else:
            parts = [t.transpose(0, 1)[None].float() for t in leaves]
            spans = [[t[:, :, a:b] for t in parts] for a, b in ((0, 2), (2, 5))]
            attend = nn.functional.scaled_dot_product_attention
            out = torch.cat([attend(*s, is_causal=True, enable_gqa=True) for s in spans], dim=2)
            out = out[0].transpose(0, 1)
        out.float().square().sum().backward()
        results.append([out.detach().cpu().float(), *(t.grad.cpu().float() for t in leaves)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0.05, atol=0.05)
