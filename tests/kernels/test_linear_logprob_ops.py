"""The log-prob ops in the dispatcher and under torch.compile, and the memory they take."""

import subprocess
import sys

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from softgrpo_kernels import linear_candidate_logprob, linear_soft_logprob, linear_token_logprob

V, H, K = 40, 8, 5
OPS = torch.ops.softgrpo_kernels


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def problem(rows, dtype=torch.float32):
    hidden = torch.randn(rows, H, dtype=dtype, requires_grad=True)
    head = torch.randn(V, H, dtype=dtype, requires_grad=True)
    bias = torch.randn(V, dtype=dtype, requires_grad=True)
    ids = torch.stack([torch.randperm(V)[:K] for _ in range(rows)])
    return hidden, head, bias, ids, torch.randint(0, V, (rows,))


# fp32: C++; fp64: plain PyTorch. Without labels: candidates only. Without slots: tokens only.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("part", ["both", "rows known", "candidates", "tokens"])
def test_linear_logprob_passes_opcheck(part, dtype):
    hidden, head, bias, ids, label = problem(6, dtype)
    label[::2] = -1
    ids, label = ids[:, : 0 if part == "tokens" else K], None if part == "candidates" else label
    temperature = torch.linspace(0.5, 2, 6, dtype=dtype)
    rows = torch.arange(1, 6, 2) if part == "rows known" else None
    arguments = (hidden, head, bias, ids, label, rows, temperature, 3.0, 0.7, True)
    torch.library.opcheck(OPS.linear_logprob.default, arguments)
    with torch.no_grad():
        dots, logp, lse, entropy = OPS.linear_logprob(*arguments)
    grads = (dots + 1, logp + 1, None, entropy + 1, lse, entropy, [True, True, True])
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    torch.library.opcheck(OPS.linear_logprob_backward.default, (*grads, *detached))


@pytest.mark.parametrize("way", ["dense", "accumulate"])
def test_a_second_derivative_is_refused(way):
    hidden, head, _, ids, label = problem(4)
    for out in (
        linear_candidate_logprob(hidden, head, ids, grad_weight=way)[:, 0],
        linear_token_logprob(hidden, head, label, grad_weight=way),
    ):
        (first,) = torch.autograd.grad(out.square().sum(), hidden, create_graph=True)
        with pytest.raises(RuntimeError, match=r"differentiable once|once_differentiable"):
            first.sum().backward()


def score(hidden, head, bias, ids, label):
    gprime = ids.to(hidden.dtype) / V - 1
    kind = (torch.arange(ids.shape[0]) % 2).to(torch.uint8)
    logp, entropy = linear_soft_logprob(
        hidden, head, ids, gprime, kind + 2, kind, label,
        temperature=0.8, bias=bias, softcap=4.0, need_entropy=True,
    )  # fmt: skip
    q = linear_candidate_logprob(hidden, head, ids, bias=bias)
    token = linear_token_logprob(hidden, head, label)
    return (logp + 0.1 * entropy + token + q[:, 0] * 0.5).sum()


def test_compiles_whole_with_a_dynamic_number_of_rows():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=count, bw_compiler=count)
    compiled = torch.compile(score, backend=backend, fullgraph=True, dynamic=True)
    for rows in (6, 9, 14):
        inputs = problem(rows)
        ours = torch.autograd.grad(compiled(*inputs), inputs[:3])
        theirs = torch.autograd.grad(score(*inputs), inputs[:3])
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 2  # one forward, one backward for all sizes


_PEAK = """
import os, pathlib, sys
import torch
from softgrpo_kernels import linear_logprob_slices, linear_soft_logprob
linear_logprob_slices._CHUNK_ELEMENTS = 1 << 20
torch.set_num_threads(1)
rows, width, k = 512, 64, 5
hidden = torch.randn(rows, width, requires_grad=True)
def kib(name):
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split(name + ":")[1].split()[0])
def run(head, way):
    if way == "accumulate":
        head.grad = torch.ones_like(head)
    ids = torch.randint(0, len(head), (rows, k))
    label = torch.randint(0, len(head), (rows,))
    kind = label * 0 + 1 if way == "rows" else label % 2
    # Sets the peak to the present size.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = kib("VmRSS")
    logp = linear_soft_logprob(
        hidden, head, ids, torch.zeros(rows, k), kind * 0 + k, kind, label, grad_weight=way
    )
    logp.sum().backward()
    return kib("VmHWM") - before
for argument in sys.argv[1:]:
    # A process each: what one has freed would be there for the next.
    if os.fork() == 0:
        vocabulary, way = argument.split(":")
        run(torch.randn(64, width, requires_grad=True), way)
        print(run(torch.randn(int(vocabulary), width, requires_grad=True), way), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def peaks_of(*cases):
    arguments = [f"{vocabulary}:{way}" for vocabulary, way in cases]
    command = [sys.executable, "-c", _PEAK, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(zip(cases, map(int, done.stdout.split()), strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_vocabulary():
    """KiB on top of the tensors given. Of 256k tokens, dW is 64 MiB and the logits of the discrete
    rows would be 256 MiB; they work in slices of 4 MiB here, of which a few live at a time (16 to
    32 MiB: when the allocator gives pages back differs)."""
    peaks = peaks_of(
        (16_384, "accumulate"), (262_144, "accumulate"), (262_144, "rows"), (262_144, "dense")
    )
    slices = 48 << 10
    assert peaks[16_384, "accumulate"] < 32 << 10, peaks  # the logits would be 32 MiB
    assert peaks[262_144, "accumulate"] < slices, peaks
    assert peaks[262_144, "rows"] < 6 << 10, peaks
    # One dW, not two: the discrete rows' and the soft rows' gradients share it.
    assert 64 << 10 <= peaks[262_144, "dense"] < (64 << 10) + slices, peaks
