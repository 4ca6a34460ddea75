"""The layers' ops in training: against fp64 autograd of the plain formulas, and what they keep."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from simulated_gpu.found import REAL
from torch.autograd.graph import saved_tensors_hooks

from softgrpo_engine.ops import differentiable, reference
from softgrpo_engine.ops.extension import cpu_extension
from softgrpo_engine.ops.linear import joined_linear
from softgrpo_engine.training.group_attention import _Layout, _rotated_heads, _VarlenAttention

ISAS = {"portable": 0, "avx2": 1, "best": 2}  # of C++
EPS = 1e-5
NARROW = [torch.float32, torch.bfloat16]
TRITON = pytest.param("triton", marks=pytest.mark.gpu) if REAL else "triton"
each_device = pytest.mark.parametrize("device", [*ISAS, TRITON], indirect=True)
each_device_and_dtype = pytest.mark.parametrize(
    ("device", "dtype"),
    [(isa, dtype) for isa in ISAS for dtype in NARROW]
    + [
        pytest.param("triton", dtype, marks=pytest.mark.gpu if REAL else ())
        for dtype in (*NARROW, torch.float16)
    ],
    indirect=["device"],
)

# NumPy's, under the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:overflow")


@pytest.fixture
def device(request, monkeypatch):
    """Where the ops run: C++ of an instruction set, or Triton, under its interpreter without a
    GPU."""
    torch.manual_seed(0)
    name, kernels = request.param, cpu_extension()
    if name == "triton":
        pytest.importorskip("triton")
        gpu = importlib.import_module("softgrpo_engine.ops.gpu")
        monkeypatch.setattr(differentiable, "_kernels", lambda x: gpu)
        yield torch.device("cuda" if REAL else "cpu")
        return
    if kernels is None:
        pytest.skip("the extension is not built")
    kernels.limit_isa(ISAS[name])
    yield torch.device("cpu")
    kernels.limit_isa(ISAS["best"])


def results(f, inputs, directions, dtype=None):
    """Outputs of f, and the gradients of its inputs along the directions."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    outs = f(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    along = [d.to(out.dtype) for d, out in zip(directions, outs, strict=True)]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, along)]


def compare(ours, plain, inputs, directions):
    """float32: 1e-5. Narrow dtypes: not further from fp64 than PyTorch's own chain."""
    exact = results(plain, inputs, directions, torch.float64)
    eager, found = results(plain, inputs, directions), results(ours, inputs, directions)
    for e, p, o in zip(exact, eager, found, strict=True):
        assert o.dtype == p.dtype
        assert o.shape == p.shape
        error, scale = (o.double() - e).norm(), e.norm()
        if inputs[0].dtype == torch.float32:
            assert error <= 1e-5 * scale
        else:
            # Of few numbers one may be rounded the other way: sums have another order. The gradient
            # of a float32 master adds up numbers that were rounded to the activations' dtype.
            one = torch.finfo(inputs[0].dtype).eps * e.abs().amax() if e.numel() else 0.0
            assert error <= 1.02 * (p.double() - e).norm() + one


def draw(*shape, device, dtype=torch.float32):
    return torch.randn(shape, device=device).to(dtype)


def plain_norm(x, residual, weight):
    return reference.rms_norm(x, weight.to(x.dtype), EPS, residual)


@each_device_and_dtype
# More rows than programs; a partial vector; one row; none.
@pytest.mark.parametrize(("rows", "width"), [(9, 100), (3, 7), (1, 64), (0, 8)])
def test_norm(device, monkeypatch, rows, width, dtype):
    for kernels, parts in (("cpu", "PARTS"), ("gpu", "PROGRAMS")):
        if kernels in differentiable._kernels(torch.empty(0)).__name__:
            module = importlib.import_module(f"softgrpo_engine.ops.{kernels}.rms_norm")
            monkeypatch.setattr(module, parts, 4)
    x, residual, *directions = (draw(rows, width, device=device, dtype=dtype) for _ in range(4))
    master = 1 + 0.3 * draw(width, device=device)
    ours = lambda x, residual, weight: differentiable.rms_norm(x, residual, weight, EPS)  # noqa: E731
    for weight in (master, master.to(dtype)):
        compare(ours, plain_norm, [x, residual, weight], directions)
        compare(
            lambda x, weight: differentiable.rms_norm(x, None, weight, EPS)[0],
            lambda x, weight: reference.rms_norm(x, weight.to(x.dtype), EPS),
            [x, weight],
            directions[:1],
        )


@each_device
def test_a_sum_whose_norm_nobody_uses(device):
    x, residual = (draw(2, 8, device=device).requires_grad_() for _ in range(2))
    _, total = differentiable.rms_norm(x, residual, torch.ones(8, device=device), EPS)
    total.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(residual.grad, x.grad)


@each_device_and_dtype
@pytest.mark.parametrize(("rows", "width"), [(2, 1100), (3, 50), (1, 1), (0, 4)])
def test_silu_mul(device, rows, width, dtype):
    gate, up, direction = (4 * draw(3, rows, width, device=device)).to(dtype)
    if rows:
        gate[0, 0] = -60.0  # the sigmoid is next to nothing
    compare(
        differentiable.silu_mul, lambda g, u: F.silu(g) * u, [gate, up], [direction]
    )  # fmt: skip
    compare(
        differentiable.silu_mul, reference.silu_mul, [torch.cat((gate, up), dim=1)], [direction]
    )


LAYOUTS = {
    "shared prompts": ([2, 1], [[2, 1, 0], [1]]),
    "one token": ([1], [[]]),
}


@each_device_and_dtype
@pytest.mark.parametrize(("heads", "kv_heads"), [(7, 2), (16, 1)])  # blocks of eight heads
@pytest.mark.parametrize("name", LAYOUTS)
def test_heads(device, name, heads, kv_heads, dtype):
    """q, and k and v where attention reads them: a prompt before each of its responses."""
    rows = {"shared prompts": [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 5, 6], "one token": [0]}[name]
    tokens, dim = max(rows) + 1, 8
    layout = _Layout.from_lens(*LAYOUTS[name])
    copies = _VarlenAttention(layout, heads, kv_heads, device)._copies
    rope = draw(tokens, dim, device=device), draw(tokens, dim, device=device)
    index = torch.tensor(rows, device=device)

    def plain(qkv):
        # Rounded as in the kernel, whatever the dtype of the comparison.
        q, k, v = _rotated_heads(qkv, tuple(r.to(dtype) for r in rope), heads, kv_heads)
        return q, k.index_select(0, index), v.index_select(0, index)

    qkv = draw(tokens, (heads + 2 * kv_heads) * dim, device=device, dtype=dtype)
    shapes = (tokens, heads), (len(rows), kv_heads), (len(rows), kv_heads)
    directions = [draw(*shape, dim, device=device, dtype=dtype) for shape in shapes]
    compare(
        lambda qkv: differentiable.rotate_heads(qkv, *rope, *copies, heads, kv_heads),
        plain,
        [qkv],
        directions,
    )


@pytest.mark.parametrize("device", ISAS, indirect=True)
def test_a_place_that_is_not_there_is_refused(device):
    qkv, rope = draw(2, 24, device=device), draw(2, 8, device=device)
    for starts, copies, message in (
        ([0, 1, 2], [0, 2], r"copies\[1\] = 2: there are 2"),
        ([0, 1, 2], [-1, 0], r"copies\[0\] = -1"),
        ([0, 2, 1], [0, 1], r"copy_starts\[2\] = 1"),
        ([0, 1, 3], [0, 1], r"copy_starts\[2\] = 3"),
    ):
        places = [torch.tensor(x, dtype=torch.int32) for x in (starts, copies)]
        with pytest.raises(ValueError, match=message):
            differentiable.rotate_heads(qkv, rope, rope, *places, 1, 1)


@each_device_and_dtype
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [5, 0])
def test_joined_linear(device, rows, with_bias, dtype):
    """Master weights; the gradient of x is rounded once, not once a product."""
    sizes = 6, 4, 1
    x, direction = (draw(rows, n, device=device, dtype=dtype) for n in (10, sum(sizes)))
    weights = [draw(n, 10, device=device) for n in sizes]
    biases = [draw(n, device=device) for n in sizes] if with_bias else []

    def plain(x, *parameters):
        weights, biases = parameters[:3], parameters[3:] or [None] * 3
        cast = [(w.to(x.dtype), b if b is None else b.to(x.dtype))
                for w, b in zip(weights, biases, strict=True)]  # fmt: skip
        return torch.cat([F.linear(x, w, b) for w, b in cast], dim=-1)

    def ours(x, *parameters):
        return joined_linear(x, list(parameters[:3]), list(parameters[3:]))

    compare(ours, plain, [x, *weights, *biases], [direction])


@each_device
def test_frozen_weights_get_no_gradient_and_take_no_work(device, monkeypatch):
    kernels = differentiable._kernels(torch.empty(0))
    asked, backward = [], kernels.rms_norm_backward

    def noted(*args, need_weight):
        asked.append(need_weight)
        return backward(*args, need_weight=need_weight)

    monkeypatch.setattr(kernels, "rms_norm_backward", noted)
    x, weight = draw(3, 8, device=device).requires_grad_(), draw(8, device=device)
    out, _ = differentiable.rms_norm(x, draw(3, 8, device=device), weight, EPS)
    matrices = [draw(4, 8, device=device), draw(4, 8, device=device).requires_grad_()]
    differentiable.silu_mul(joined_linear(out, matrices, [])).sum().backward()
    assert asked == [False]
    assert weight.grad is None
    assert matrices[0].grad is None
    assert all(leaf.grad.norm() > 0 for leaf in (x, matrices[1]))


@each_device
def test_inputs_that_are_not_contiguous(device):
    x, weight = draw(8, 6, device=device).T.requires_grad_(), draw(8, device=device)
    halves = draw(6, 40, device=device)[:, ::2].requires_grad_()

    def outs(copy):
        norms = differentiable.rms_norm(copy(x), copy(x), weight, EPS)
        return sum(o.square().sum() for o in (*norms, differentiable.silu_mul(copy(halves))))

    ours, expected = (
        torch.autograd.grad(outs(copy), (x, halves)) for copy in (lambda x: x, torch.clone)
    )
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


def kept_by(f):
    """Addresses of what autograd keeps for the backward pass of f."""
    kept = []
    with saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        out = f()
    return set(kept), out


@each_device
def test_what_is_kept(device):
    """Of the size of activations: the sum, the input of a product, gate and up; nothing without
    autograd."""
    x, residual = (draw(3, 8, device=device).requires_grad_() for _ in range(2))
    weight, matrices = draw(8, device=device), [draw(4, 8, device=device) for _ in range(2)]
    kept, (out, total) = kept_by(lambda: differentiable.rms_norm(x, residual, weight, EPS))
    assert kept == {total.data_ptr(), weight.data_ptr()}
    kept, gate_up = kept_by(lambda: joined_linear(out, matrices, []))
    assert kept == {t.data_ptr() for t in (out, *matrices)}
    kept, _ = kept_by(lambda: differentiable.silu_mul(gate_up))
    assert kept == {gate_up.data_ptr()}
    with torch.no_grad():
        kept, (out, _) = kept_by(lambda: differentiable.rms_norm(x, residual, weight, EPS))
    assert not kept
    assert out.grad_fn is None


@each_device
def test_bad_input_is_one_clear_error(device):
    x, weight = draw(2, 8, device=device), draw(8, device=device)
    with pytest.raises(ValueError, match=r"weight must be \[8\], not \[7\]"):
        differentiable.rms_norm(x, None, weight[:7], EPS)
    with pytest.raises(ValueError, match="residual must have the shape and dtype"):
        differentiable.rms_norm(x, x.bfloat16(), weight, EPS)
    with pytest.raises(ValueError, match="up must have the shape and dtype"):
        differentiable.silu_mul(x, x[:1])


@each_device
def test_they_are_differentiable_once(device):
    x = draw(2, 8, device=device).requires_grad_()
    loss = differentiable.silu_mul(x).square().sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
