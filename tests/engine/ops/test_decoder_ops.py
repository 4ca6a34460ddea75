import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from softgrpo_engine.ops import reference
from softgrpo_engine.ops.extension import cpu_extension
from softgrpo_engine.ops.paged_attention import paged_attention
from softgrpo_engine.ops.rms_norm import rms_norm
from softgrpo_engine.ops.rope_store_kv import rope_store_kv
from softgrpo_engine.ops.silu_mul import silu_mul

DTYPES = [torch.bfloat16, torch.float32]
EPS = 1e-5


@pytest.fixture(autouse=True, params=[0, 1, 2], ids=["portable", "avx2", "best"])
def _isa(request):
    if cpu_extension() is None:
        yield
        return
    cpu_extension().limit_isa(request.param)
    yield
    cpu_extension().limit_isa(2)


def randn(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ulps(a, b):
    """Distance in representable numbers of the dtype."""
    integer = {torch.bfloat16: torch.int16, torch.float32: torch.int32}[a.dtype]
    ordered = []
    for x in (a, b):
        bits = x.contiguous().view(integer).long()
        ordered.append(torch.where(bits < 0, -(bits & torch.iinfo(integer).max), bits))
    return (ordered[0] - ordered[1]).abs()


def assert_almost_bitwise(out, expected, tiny=0.0):
    """Equal bits but for the rare value whose fp32 intermediate, summed in another order, falls on
    the other side of a rounding."""
    distance = ulps(out, expected)[expected.abs() >= tiny]
    if out.dtype == torch.bfloat16:
        # A flip before the product with the weight moves the product by up to two.
        assert distance.max() <= 2
        assert (distance > 0).float().mean() <= 2e-3
    else:
        assert distance.max() <= 6


@pytest.mark.parametrize("dtype", DTYPES)
# One row below the size for threads, one above; H of SmolLM2; a partial vector; less than one.
@pytest.mark.parametrize(("rows", "hidden"), [(64, 576), (9, 2048), (5, 100), (3, 7)])
def test_rms_norm_is_hugging_faces(rows, hidden, dtype):
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
@pytest.mark.parametrize(("rows", "width"), [(64, 1536), (3, 100), (2, 3)])
def test_silu_mul_is_hugging_faces(rows, width, dtype):
    gate_up = 4 * randn(rows, 2 * width, dtype=dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    assert_almost_bitwise(silu_mul(gate_up), F.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_over_the_whole_range(dtype):
    gate = torch.cat((torch.linspace(-120, 120, 4801), torch.tensor([-1e30, 1e30, 0.0]))).to(dtype)
    out = silu_mul(torch.cat((gate, torch.ones_like(gate)))[None])[0]
    exact = F.silu(gate.double())
    assert ((out - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-36).all()
    special = torch.tensor([[float("nan"), float("inf"), 1.0, 1.0]], dtype=dtype)
    assert torch.equal(silu_mul(special).isnan(), torch.tensor([[True, False]]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "num_heads", "num_kv_heads", "dim", "page"),
    [(64, 9, 3, 64, 16), (70, 14, 2, 128, 32), (5, 2, 1, 20, 3)],
)
def test_rope_store_kv_is_hugging_faces(rows, num_heads, num_kv_heads, dim, page, dtype):
    qkv = randn(rows, (num_heads + 2 * num_kv_heads) * dim, dtype=dtype)
    positions = torch.arange(rows)[:, None] * 7
    angles = positions * 1e4 ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = angles.cos(), angles.sin()
    num_pages = rows // page + 2
    generator = torch.Generator().manual_seed(3)
    slots = torch.randperm(num_pages * page, generator=generator)[:rows]
    k_pages = torch.full((num_pages, num_kv_heads, page, dim), 5.0, dtype=dtype)
    v_pages = k_pages.clone()
    expected_k, expected_v = k_pages.clone(), v_pages.clone()
    q = rope_store_kv(qkv, cos, sin, k_pages, v_pages, slots, num_heads, num_kv_heads)

    heads = qkv.view(rows, -1, dim).transpose(0, 1)[None]
    expected_q, k = apply_rotary_pos_emb(
        heads[:, :num_heads],
        heads[:, num_heads : num_heads + num_kv_heads],
        cos.to(dtype)[None],
        sin.to(dtype)[None],
    )
    expected_k[slots // page, :, slots % page] = k[0].transpose(0, 1)
    expected_v[slots // page, :, slots % page] = heads[0, num_heads + num_kv_heads :].transpose(
        0, 1
    )
    assert torch.equal(q, expected_q[0].transpose(0, 1))
    assert torch.equal(k_pages, expected_k)
    assert torch.equal(v_pages, expected_v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_agrees(dtype):
    x, weight = randn(6, 96, dtype=dtype), randn(96, dtype=dtype, seed=1)
    assert_almost_bitwise(rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS))
    assert_almost_bitwise(silu_mul(x), reference.silu_mul(x))
    pages = [torch.zeros(2, 1, 4, 16, dtype=dtype) for _ in range(4)]
    cos, sin = randn(6, 16, dtype=torch.float32), randn(6, 16, dtype=torch.float32, seed=2)
    slots = torch.tensor([7, 0, 3, 2, 1, 4])
    q = rope_store_kv(x, cos, sin, *pages[:2], slots, 4, 1)
    assert torch.equal(q, reference.rope_store_kv(x, cos, sin, *pages[2:], slots, 4, 1))
    assert torch.equal(pages[0], pages[2])
    assert torch.equal(pages[1], pages[3])


def test_float64_stays_float64():
    x, weight = randn(4, 10, dtype=torch.float64), randn(10, dtype=torch.float64, seed=1)
    expected = F.rms_norm(x, (10,), weight, EPS)
    torch.testing.assert_close(rms_norm(x, weight, EPS), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.skipif(cpu_extension() is None, reason="checks of the compiled path")
def test_bad_input_is_one_clear_error():
    x = randn(4, 12, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"weight must be torch\.float32 \[12\]"):
        rms_norm(x, torch.ones(11), EPS)
    with pytest.raises(ValueError, match="residual must have the shape"):
        rms_norm(x, torch.ones(12), EPS, x[:2])
    with pytest.raises(ValueError, match="even last dimension"):
        silu_mul(x[:, :5])
    with pytest.raises(ValueError, match="inference_mode"):
        silu_mul(x.clone().requires_grad_())
    pages, angles = torch.zeros(2, 1, 4, 4), torch.zeros(4, 4)
    for slot, message in ((8, "the cache has 8 slots"), (-1, r"slot_mapping\[0\] = -1")):
        slots = torch.tensor([slot, 0, 1, 2])
        with pytest.raises(ValueError, match=message):
            rope_store_kv(x, angles, angles, pages, pages.clone(), slots, 1, 1)
    with pytest.raises(ValueError, match="must be float32"):
        rope_store_kv(x, angles.bfloat16(), angles, pages, pages.clone(), slots, 1, 1)
    with pytest.raises(ValueError, match="does not fit pages"):
        rope_store_kv(x, angles, angles, pages, pages.clone(), slots, 2, 1)


@pytest.mark.skipif(cpu_extension() is None, reason="no C++ extension")
def test_wrong_ranks_devices_and_eps_are_named():
    x, weight = torch.zeros(2, 8), torch.ones(8)
    pages, table = torch.zeros(3, 1, 4, 8), torch.zeros(2, 1, dtype=torch.int32)
    lens, q = torch.ones(2, dtype=torch.int32), torch.zeros(2, 2, 8)
    for message, call in (
        ("x must have 2 dimensions", lambda: rms_norm(x[0], weight, 1e-5)),
        ("weight is on meta", lambda: rms_norm(x, weight.to("meta"), 1e-5)),
        ("eps must be >= 0", lambda: rms_norm(x, weight, -1e-5)),
        ("eps must be >= 0", lambda: rms_norm(x, weight, float("nan"))),
        ("residual is on meta", lambda: rms_norm(x, weight, 1e-5, x.to("meta"))),
        ("gate_up must have 2 dimensions", lambda: silu_mul(x[None])),
        ("q must have 3", lambda: paged_attention(x, pages, pages, table, lens, scale=1.0)),
        (
            "seq_lens is on meta",
            lambda: paged_attention(q, pages, pages, table, lens.to("meta"), scale=1.0),
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
