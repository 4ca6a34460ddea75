"""What kernels of the simulated device take, and what flash attention computes."""

import pytest
import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn

from simulated_gpu import flash


def cuda(*values, **options):
    return torch.tensor(values, device="cuda", **options)


def test_triton_takes_device_pointers_alone(x):
    from softgrpo_engine.ops.gpu.silu_mul import silu_mul_kernel

    out = torch.empty(1, 2, device="cuda")
    with pytest.raises(ValueError, match=r"Pointer argument \(at 1\) cannot be accessed"):
        silu_mul_kernel[(1, 1)](out, torch.ones(1, 4), 2, BLOCK_I=16)
    with pytest.raises(RuntimeError, match="invalid argument"):
        silu_mul_kernel[(0, 1)](out, x, 2, BLOCK_I=16)


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


SOFT_STEP = {"fill_rows_kernel": 1, "statistics_kernel": 1, "sample_kernel": 1}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_k": 3}, SOFT_STEP),
        ({"mode": 1}, {**SOFT_STEP, "collect_kernel": 1}),
        ({"top_k": 3, "mode": "tensor"}, SOFT_STEP),
        ({"top_k": "tensor", "mode": "tensor"}, {**SOFT_STEP, "collect_kernel": 1}),
    ],
)
def test_launches_of_soft_token(simulated_gpu, settings, expected):
    """Mixture included. It was 25: 16 fills, 8 kernels, and one more to empty a list."""
    from softgrpo_kernels import soft_token

    logits, embed = torch.randn(2, 40, device="cuda"), torch.randn(40, 8, device="cuda")
    values = {"top_k": cuda(3, 3), "mode": cuda(2, 1)}
    settings = {k: values[k] if v == "tensor" else v for k, v in settings.items()}
    with simulated_gpu.counting() as counts:
        out = soft_token(logits, embed, k_max=4, **settings)
    assert counts.launches == expected
    assert counts.waits.total() == 0, counts.table()
    assert out.valid.all()


def test_more_rows_than_the_second_axis_of_a_grid_has(simulated_gpu, monkeypatch):
    import triton.language as tl

    from softgrpo_kernels import soft_token
    from softgrpo_kernels.gpu.soft_token import full_vocabulary

    monkeypatch.setattr(full_vocabulary, "CAPACITY", tl.constexpr(4))
    rows = 65_537
    logits = torch.randn(rows, 3, device="cuda")
    for mode in (1, 2):
        out = soft_token(logits, top_k=1, k_max=2, mode=torch.full((rows,), mode, device="cuda"))
        assert out.token.cpu().equal(logits.cpu().argmax(-1).int())
    out = soft_token(logits, mode=1, top_p=1e-9, k_max=1)
    assert out.token.cpu().equal(logits.cpu().argmax(-1).int())


@pytest.mark.parametrize(("kind_on", "waits"), [("cpu", 0), ("cuda", 1)])
def test_rows_of_a_training_pass_are_found_without_a_wait(simulated_gpu, kind_on, waits):
    """Where the host knows their kind; else with one, for both passes."""
    from softgrpo_kernels import linear_soft_logprob

    torch.manual_seed(0)
    kind = torch.tensor([1, 0, 1, 0], dtype=torch.uint8)
    hidden, head = torch.randn(4, 8), torch.randn(30, 8)
    ids, gprime = torch.randint(0, 30, (4, 3)), torch.randn(4, 3).sort(descending=True).values
    gradients = []
    for device in ("cpu", "cuda"):
        leaves = [x.to(device, copy=True).requires_grad_() for x in (hidden, head)]
        record = [x.to(device) for x in (ids, gprime, torch.full((4,), 3))]
        label, row_kind = ids[:, 0].to(device), kind.to(kind_on if device == "cuda" else "cpu")
        with simulated_gpu.counting() as counts:
            linear_soft_logprob(*leaves, *record, row_kind, label).sum().backward()
        assert counts.waits.total() == (waits if device == "cuda" else 0), counts.table()
        gradients.append([x.grad.cpu() for x in leaves])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected)
