import pytest
import torch
import torch.nn.functional as F
from almost_bitwise import assert_almost_bitwise, randn

from softgrpo_engine.ops import reference
from softgrpo_engine.ops.extension import cpu_extension
from softgrpo_engine.ops.silu_mul import silu_mul

pytestmark = pytest.mark.usefixtures("each_isa")
DTYPES = [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(64, 1536), (3, 100), (2, 3)])
def test_it_is_hugging_faces(rows, width, dtype):
    gate_up = 4 * randn(rows, 2 * width, dtype=dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    assert_almost_bitwise(silu_mul(gate_up), F.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_range(dtype):
    gate = torch.cat((torch.linspace(-120, 120, 4801), torch.tensor([-1e30, 1e30, 0.0]))).to(dtype)
    out = silu_mul(torch.cat((gate, torch.ones_like(gate)))[None])[0]
    exact = F.silu(gate.double())
    assert ((out - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-36).all()
    special = torch.tensor([[float("nan"), float("inf"), 1.0, 1.0]], dtype=dtype)
    assert torch.equal(silu_mul(special).isnan(), torch.tensor([[True, False]]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_agrees(dtype):
    x = randn(6, 96, dtype=dtype)
    assert_almost_bitwise(silu_mul(x), reference.silu_mul(x))


@pytest.mark.skipif(cpu_extension() is None, reason="checks of the compiled path")
def test_bad_input_is_one_clear_error():
    x = torch.zeros(4, 12)
    for message, bad in (
        ("even last dimension", x[:, :5]),
        ("gate_up must have 2 dimensions", x[None]),
        ("inference_mode", x.clone().requires_grad_()),
    ):
        with pytest.raises(ValueError, match=message):
            silu_mul(bad)
