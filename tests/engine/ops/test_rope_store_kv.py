import pytest
import torch
from almost_bitwise import randn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from softgrpo_engine.ops import reference
from softgrpo_engine.ops.extension import cpu_extension
from softgrpo_engine.ops.rope_store_kv import rope_store_kv

pytestmark = pytest.mark.usefixtures("each_isa")
DTYPES = [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "num_heads", "num_kv_heads", "dim", "page"),
    [(64, 9, 3, 64, 16), (70, 14, 2, 128, 32), (5, 2, 1, 20, 3)],
)
def test_it_is_hugging_faces(rows, num_heads, num_kv_heads, dim, page, dtype):
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
    x = randn(6, 96, dtype=dtype)
    pages = [torch.zeros(2, 1, 4, 16, dtype=dtype) for _ in range(4)]
    cos, sin = randn(6, 16, dtype=torch.float32), randn(6, 16, dtype=torch.float32, seed=2)
    slots = torch.tensor([7, 0, 3, 2, 1, 4])
    q = rope_store_kv(x, cos, sin, *pages[:2], slots, 4, 1)
    assert torch.equal(q, reference.rope_store_kv(x, cos, sin, *pages[2:], slots, 4, 1))
    assert torch.equal(pages[0], pages[2])
    assert torch.equal(pages[1], pages[3])


@pytest.mark.skipif(cpu_extension() is None, reason="checks of the compiled path")
def test_bad_input_is_one_clear_error():
    x = randn(4, 12, dtype=torch.float32)
    pages, angles = torch.zeros(2, 1, 4, 4), torch.zeros(4, 4)
    for slot, message in ((8, "the cache has 8 slots"), (-1, r"slot_mapping\[0\] = -1")):
        slots = torch.tensor([slot, 0, 1, 2])
        with pytest.raises(ValueError, match=message):
            rope_store_kv(x, angles, angles, pages, pages.clone(), slots, 1, 1)
    with pytest.raises(ValueError, match="must be float32"):
        rope_store_kv(x, angles.bfloat16(), angles, pages, pages.clone(), slots, 1, 1)
    with pytest.raises(ValueError, match="does not fit pages"):
        rope_store_kv(x, angles, angles, pages, pages.clone(), slots, 2, 1)
