"""The rules of the simulated device, each with a test that fails when it is taken out: tensors,
devices that meet, waits, pinned memory, training. See test_graphs.py and test_kernels.py too."""

import copy
import multiprocessing
import pickle
import threading

import pytest
import torch
from torch import nn

from simulated_gpu import found
from simulated_gpu.host_waits import WAITS

HERE = "tests/simulated_gpu/test_device.py"


def cuda(*values, **options):
    return torch.tensor(values, device="cuda", **options)


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


def test_it_divides_by_a_number_as_cuda_does(x):
    """By its reciprocal, in place too; a divisor on the device divides."""
    y = torch.linspace(0.1, 9.0, 1000)
    by_number = y.cuda() / 0.1
    assert torch.equal(by_number.cpu(), y * (1 / torch.tensor(0.1)))
    assert not torch.equal(by_number.cpu(), y / 0.1)
    assert torch.equal(y.cuda().div_(torch.tensor(0.1)).cpu(), by_number.cpu())
    assert torch.equal((y.cuda() / cuda(0.1)).cpu(), y / 0.1)
    assert (x // 2).tolist() == [0, 0, 1, 1]
    assert torch.equal((2 / y.cuda()).cpu(), 2 / y)


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
    """The thread that computes it has no line of Python."""
    chosen = x.requires_grad_()[x > 1].sum()
    with simulated_gpu.counting() as counts:
        chosen.backward()
    assert counts.waits
    assert all(line.startswith(HERE) for _, line in counts.waits), counts.table()


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


def test_a_thread_that_copies_to_it_and_one_that_launches_do_not_wait_for_each_other(
    x, simulated_gpu
):
    """Another reference to a tensor of Python's takes the GIL, which whoever launches has."""

    def copy():
        for _ in range(2000):
            torch.empty(4, pin_memory=True).copy_(x, non_blocking=True)

    def both():
        thread = threading.Thread(target=copy)
        thread.start()
        while thread.is_alive():
            simulated_gpu.core.launches()

    process = multiprocessing.get_context("fork").Process(target=both)
    process.start()
    process.join(30)
    process.kill()
    assert process.exitcode == 0


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
