"""The LM head fused with the statistics of its logits, and the soft step that starts from it."""

import pytest
import torch
from gpu_cases import EXACT, FLOATS

from softgrpo_kernels import soft_token
from softgrpo_kernels.gpu import soft_token as step
from softgrpo_kernels.gpu.soft_token.rows import Rows
from softgrpo_kernels.lm_head import LMHead
from softgrpo_kernels.row_parameters import RowParameters

GREEDY, DISCRETE, SOFT, SKIP = range(4)


def integers(*shape, dtype):
    """Their products and sums are exact, so that all back ends round the same logits."""
    return torch.randint(-2, 3, shape).to(dtype)


def compare(device, hidden, head, **settings):
    settings |= {"need_lse": True, "need_entropy": True, "need_kept_mass": True, "k_max": 8}
    embed = torch.randn(len(head), 9)
    expected = soft_token(None, embed, hidden=hidden, lm_head=head, backend="reference", **settings)
    moved = {k: v.to(device) if torch.is_tensor(v) else v for k, v in settings.items()}
    hidden, head, embed = (x.to(device) for x in (hidden, head, embed))
    out = soft_token(None, embed, hidden=hidden, lm_head=head, backend="triton", **moved)
    for name in EXACT:
        assert torch.equal(getattr(out, name).cpu(), getattr(expected, name)), name
    for name in (*FLOATS, "embed"):
        a, b = getattr(out, name).cpu(), getattr(expected, name)
        torch.testing.assert_close(a, b, rtol=3e-6, atol=1e-5, equal_nan=True, msg=name)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [5, 129, 300])
def test_from_hidden(device, dtype, vocabulary):
    """Less than a tile, a tile and a bit, several; a width that is no multiple of the block."""
    hidden = integers(3, 70, dtype=dtype)
    head = integers(70, vocabulary + 3, dtype=dtype).T[3:]
    compare(device, hidden, head, top_k=7, top_p=0.93, temperature=9.0, position=torch.arange(3))


@pytest.mark.parametrize("most_rows", [128, 1])
def test_several_chunks_and_more_rows_than_the_kernel_takes(device, monkeypatch, most_rows):
    monkeypatch.setattr(step, "MOST_ROWS", most_rows)
    hidden, head = (integers(n, 16, dtype=torch.bfloat16) for n in (2, 4200))
    compare(device, hidden, head, top_k=8, temperature=4.0, uid=torch.arange(2))


def test_every_mode_with_bias_softcap_and_scale(device):
    hidden, head, bias = torch.randn(6, 32), torch.randn(300, 32), torch.randn(300)
    out = compare(
        device, hidden, head, bias=bias, softcap=20.0, logit_scale=0.5,
        mode=torch.tensor([GREEDY, DISCRETE, SOFT, SKIP, DISCRETE, SOFT]),
        top_k=torch.tensor([0, 7, 5, 0, 0, 8]), temperature=torch.tensor([0, 0.7, 1, 0, 1.3, 1]),
        uid=torch.arange(6),
    )  # fmt: skip
    assert out.kind.tolist() == [0, 0, 1, 0, 0, 1]


def test_bad_hidden_states_are_marked(device):
    hidden, head = torch.randn(3, 32), torch.randn(300, 32)
    hidden[1, 4] = torch.nan
    head[7] = torch.inf
    out = compare(device, hidden.abs(), head.abs(), top_k=4)
    assert out.valid.tolist() == [False] * 3
    head[7] = 0.0
    assert compare(device, hidden, head, top_k=4).valid.tolist() == [True, False, True]


def test_statistics_are_those_of_the_logits_that_were_stored(device):
    from softgrpo_kernels.gpu.soft_token.lm_head import lm_head_statistics
    from softgrpo_kernels.gpu.soft_token.statistics import vocabulary_statistics

    hidden, weight = (torch.randn(n, 40).bfloat16().to(device) for n in (3, 4200))
    rows = parameters(3, device)
    logits, tile_max, chunk_sums = lm_head_statistics(
        LMHead(hidden, weight), rows, need_entropy=True
    )
    exact = (hidden.double() @ weight.double().T).cpu()
    torch.testing.assert_close(logits.double().cpu(), exact, rtol=2**-8, atol=1e-3)
    same_max, same_sums = vocabulary_statistics(logits, rows, need_entropy=True)
    assert torch.equal(tile_max, same_max)
    torch.testing.assert_close(chunk_sums, same_sums, rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_its_batch(device):
    from softgrpo_kernels.gpu.soft_token.lm_head import lm_head_statistics

    hidden, weight = (torch.randn(n, 40).to(device) for n in (67, 300))
    together = lm_head_statistics(
        LMHead(hidden, weight), parameters(67, device), need_entropy=False
    )
    alone = lm_head_statistics(
        LMHead(hidden[66:], weight), parameters(1, device), need_entropy=False
    )
    assert torch.equal(together[0][66], alone[0][0])
    assert torch.equal(together[2][66, :, :2], alone[2][0, :, :2])


def parameters(rows, device):
    packed = RowParameters.pack(
        rows, device, 8, temperature=0.7, top_k=8, top_p=1.0, min_p=0.0, gumbel_tau=0.1,
        noise_scale=1.0, noise_clamp=None, weight_floor=0.0,
        eps=0.0, seed=0, position=0, uid=0, stream=0, mode=SOFT,
        noise="gumbel",
    )  # fmt: skip
    return Rows.of_batch(packed)
