import pytest
import torch
import torch.nn.functional as F
from almost_bitwise import assert_almost_bitwise, randn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from softgrpo_engine.ops import reference
from softgrpo_engine.ops.extension import cpu_extension
from softgrpo_engine.ops.rms_norm import rms_norm

pytestmark = pytest.mark.usefixtures("each_isa")
DTYPES = [torch.bfloat16, torch.float32]
EPS = 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
# One row below the size for threads, one above; H of SmolLM2; a partial vector; less than one.
@pytest.mark.parametrize(("rows", "hidden"), [(64, 576), (9, 2048), (5, 100), (3, 7)])
def test_it_is_hugging_faces(rows, hidden, dtype):
    x, residual = randn(rows, hidden, dtype=dtype), 3 * randn(rows, hidden, dtype=dtype, seed=1)
    norm = LlamaRMSNorm(hidden, EPS).to(dtype).requires_grad_(False)
    norm.weight.copy_(1 + 0.3 * randn(hidden, dtype=dtype, seed=2))
    before = residual.clone()
    alone = rms_norm(x, norm.weight, EPS)
    out, total = rms_norm(x, norm.weight, EPS, residual)
    assert_almost_bitwise(alone, norm(x))
    assert torch.equal(total, before + x)
    assert_almost_bitwise(out, norm(before + x))
    assert torch.equal(residual, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_agrees(dtype):
    x, weight = randn(6, 96, dtype=dtype), randn(96, dtype=dtype, seed=1)
    assert_almost_bitwise(rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS))


def test_float64_stays_float64():
    x, weight = randn(4, 10, dtype=torch.float64), randn(10, dtype=torch.float64, seed=1)
    expected = F.rms_norm(x, (10,), weight, EPS)
    torch.testing.assert_close(rms_norm(x, weight, EPS), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.skipif(cpu_extension() is None, reason="checks of the compiled path")
@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"weight must be torch\.float32 \[8\]", lambda x, w: (x, w[:7], EPS)),
        ("residual must have the shape", lambda x, w: (x, w, EPS, x[:1])),
        ("x must have 2 dimensions", lambda x, w: (x[0], w, EPS)),
        ("weight is on meta", lambda x, w: (x, w.to("meta"), EPS)),
        ("residual is on meta", lambda x, w: (x, w, EPS, x.to("meta"))),
        ("eps must be >= 0", lambda x, w: (x, w, -EPS)),
        ("eps must be >= 0", lambda x, w: (x, w, float("nan"))),
    ],
)
def test_bad_input_is_one_clear_error(message, arguments):
    with pytest.raises(ValueError, match=message):
        rms_norm(*arguments(torch.zeros(2, 8), torch.ones(8)))
