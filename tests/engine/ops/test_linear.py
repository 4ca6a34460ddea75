"""Linear layers of training: both ways of multiplying bfloat16, against float64."""

import pytest
import torch
import torch.nn.functional as F

from softgrpo_engine.ops.linear import has_bf16_products, linear, product_dtype


@pytest.fixture(params=[True, False], ids=["bf16 products", "as float32"])
def has_products(request, monkeypatch):
    monkeypatch.setattr("softgrpo_engine.ops.linear.has_bf16_products", lambda: request.param)
    return request.param


@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_of_master_weights(has_products, with_bias):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    x, d_out = draw(3, 7, 96).bfloat16().requires_grad_(), draw(3, 7, 40).bfloat16()
    weight = draw(40, 96).requires_grad_()
    bias = draw(40).requires_grad_() if with_bias else None
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
    out = linear(x, weight, bias)
    grads = torch.autograd.grad(out, leaves, d_out)
    # The weights count with the values that they have in the dtype of the computation.
    exact = [leaf.detach().bfloat16().double().requires_grad_() for leaf in leaves]
    expected = F.linear(*exact)
    expected_grads = torch.autograd.grad(expected, exact, d_out.double())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-5)
    for leaf, grad, wanted in zip(leaves, grads, expected_grads, strict=True):
        assert grad.dtype == leaf.dtype
        # As float32 a master's gradient is not rounded to bfloat16 on the way.
        unrounded = leaf is not x and not has_products
        rtol, atol = (1e-5, 1e-5) if unrounded else (2**-7, 2e-2)
        torch.testing.assert_close(grad.double(), wanted, rtol=rtol, atol=atol)


def test_what_needs_no_gradient_gets_none(has_products):
    x, weight = torch.randn(4, 6).bfloat16(), torch.randn(5, 6, requires_grad=True)
    linear(x, weight).float().sum().backward()
    frozen, x = weight.detach(), x.requires_grad_()
    linear(x, frozen).float().sum().backward()
    assert weight.grad is not None
    assert x.grad is not None


def test_one_row(has_products):
    x = torch.randn(6).bfloat16().requires_grad_()
    weight, bias = torch.randn(5, 6, requires_grad=True), torch.randn(5, requires_grad=True)
    grads = torch.autograd.grad(linear(x, weight, bias).float().sum(), (weight, bias))
    assert torch.equal(grads[0], x.float().expand(5, 6))
    assert torch.equal(grads[1], torch.ones(5))


def test_only_bfloat16_on_a_cpu_without_instructions_is_widened(has_products):
    wide = torch.bfloat16 if has_products else torch.float32
    assert product_dtype(torch.zeros(1).bfloat16()) == wide
    assert product_dtype(torch.zeros(1).bfloat16().to("meta")) == torch.bfloat16
    for dtype in (torch.float32, torch.float64, torch.float16):
        assert product_dtype(torch.zeros(1, dtype=dtype)) == dtype


def test_avx2_alone_has_none(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for supported in (False, True):
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda s=supported: s)
        assert has_bf16_products.__wrapped__() == supported


def test_without_onednn_there_are_none(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    monkeypatch.setattr("torch.ops.mkldnn", None)
    assert not has_bf16_products.__wrapped__()
