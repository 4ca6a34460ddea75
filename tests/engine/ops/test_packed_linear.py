"""Linear layers with packed weights: values, and rows that do not depend on the batch."""

import pytest
import torch
import torch.nn.functional as F

from softgrpo_engine.model.projections import PackedLinear
from softgrpo_engine.ops.extension import cpu_extension
from softgrpo_engine.ops.packed_linear import (
    is_fastest,
    matrix_unit,
    pack_weight,
    packed_linear,
)

kernels = cpu_extension()
UNITS = ["", "avx512_bf16", "amx"]


@pytest.fixture(params=["amx", "avx512_bf16", "avx512", "avx2", "portable"])
def unit(request):
    """Every way in which this machine can multiply, one after the other."""
    if kernels is None:
        pytest.skip("no C++ extension")
    if request.param in UNITS:
        level = UNITS.index(request.param)
        kernels.limit_matrix_unit(level)
        if matrix_unit() != request.param:
            kernels.limit_matrix_unit(2)
            pytest.skip(f"this machine has no {request.param}")
    else:
        kernels.limit_matrix_unit(0)
        kernels.limit_isa(["portable", "avx2", "avx512"].index(request.param))
    yield request.param
    kernels.limit_matrix_unit(2)
    kernels.limit_isa(2)


# Rows: one, few (whole blocks of columns at once), a tile of 16, a block of 32 and a bit, more
# than a chunk of 256.
# Width: odd tiles are zero; 34 is no multiple of a matrix unit's depth.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("columns", "width"), [(96, 64), (40, 64), (5, 34)])
@pytest.mark.parametrize("rows", [1, 3, 16, 47, 300])
def test_products(unit, dtype, rows, columns, width):
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(*s).to(dtype) for s in ((rows, width), (columns, width), (columns,))
    )
    for b in (None, bias):
        packed = pack_weight(weight, b)
        out = packed_linear(x, packed)
        exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
        tolerance = {torch.bfloat16: 2**-8, torch.float32: 1e-6}[dtype]
        torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=1e-5)
        for i in (0, rows // 2, rows - 1):
            assert torch.equal(packed_linear(x[i : i + 1], packed)[0], out[i])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_bias", [False, True])
def test_swiglu_is_that_of_separate_operations(unit, dtype, with_bias):
    torch.manual_seed(0)
    x, weight = torch.randn(21, 64).to(dtype), torch.randn(96, 64).to(dtype)
    bias = torch.randn(96).to(dtype) if with_bias else None
    out = packed_linear(x, pack_weight(weight, bias, silu_mul=True))
    gate, up = packed_linear(x, pack_weight(weight, bias)).chunk(2, dim=-1)
    torch.testing.assert_close(out, F.silu(gate) * up, rtol=2e-6, atol=1e-6)


def test_nothing_depends_on_the_threads(unit):
    x, packed = torch.randn(70, 64).bfloat16(), pack_weight(torch.randn(224, 64).bfloat16())
    threads = torch.get_num_threads()
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(packed_linear(x, packed))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_without_the_extension_it_is_plain_pytorch():
    weight, x = torch.randn(30, 7), torch.randn(3, 7)  # an odd width is not packed
    packed = pack_weight(weight, silu_mul=True)
    assert not packed.is_compiled
    gate, up = F.linear(x, weight).chunk(2, dim=-1)
    torch.testing.assert_close(packed_linear(x, packed), F.silu(gate) * up)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"bias \[N\]"):
        pack_weight(torch.randn(4, 6), torch.randn(3))
    with pytest.raises(ValueError, match="rows of gate and of up"):
        pack_weight(torch.randn(5, 6), silu_mul=True)
    packed = pack_weight(torch.randn(4, 6))
    for x in (torch.randn(2, 5), torch.randn(2, 6).bfloat16(), torch.randn(6)):
        with pytest.raises(ValueError, match=r"x must be torch.float32 \[T, 6\]"):
            packed_linear(x, packed)


def test_a_decoder_multiplies_with_it_from_avx2_on(unit):
    """It did so in bfloat16 with a matrix unit only: AVX2 took PyTorch's, 8 times slower."""
    for dtype in (torch.bfloat16, torch.float32):
        ours = PackedLinear(torch.randn(32, 64).to(dtype)).ours
        assert (ours is not None) == (unit != "portable") == is_fastest(dtype)
    assert not is_fastest(torch.float64)
