"""The ops as torch sees them: registration, compilation, room given by the caller."""

from dataclasses import fields, replace

import pytest
import torch
from torch.library import opcheck

from softgrpo_kernels import (
    SoftToken,
    gumbel_noise,
    soft_embedding,
    soft_token,
)
from softgrpo_kernels.row_parameters import RowParameters

OPS = torch.ops.softgrpo_kernels
STATISTICS = {"need_lse": True, "need_entropy": True, "need_kept_mass": True}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def room(rows, k_max, embed, *, fill=0.0):
    logits = torch.empty(rows, 1)
    layout = SoftToken.layout(logits, k_max, embed, True, True, True)
    return SoftToken(**{n: torch.full(s[1], fill).to(s[0]) for n, s in layout.items()})


def test_opcheck():
    ids = torch.randint(-1, 500, (6, 3), dtype=torch.int32)
    embed = torch.randn(500, 16, requires_grad=True)
    weights = torch.rand(6, 3, requires_grad=True)
    opcheck(OPS.soft_embedding.default, (ids, weights, embed))
    opcheck(OPS.gumbel_noise.default, (ids, *(torch.arange(6) for _ in range(4))))
    rows = RowParameters.pack(
        6, torch.device("cpu"), 8, temperature=1.0, top_k=5, top_p=0.9, min_p=0.0, gumbel_tau=0.1,
        noise_scale=1.0, noise_clamp=None, weight_floor=0.0,
        eps=0.0, seed=0, position=torch.arange(6), uid=0,
        stream=0, mode=2, noise="gumbel",
    )  # fmt: skip
    out = room(6, 8, embed)
    tables = (torch.randn(6, 500), embed.detach(), rows.floats, rows.ints)
    rest = (True, None, None, None, None, None, 1.0, False)
    opcheck(OPS.soft_token.default, (*tables, *rest, *(getattr(out, f.name) for f in fields(out))))


def step(logits, embed, position):
    out = soft_token(logits, embed, top_k=9, top_p=0.95, position=position, need_lse=True)
    noise = gumbel_noise(out.ids, 0, position, 0)
    return out.ids, out.gprime, out.embed, out.lse, noise


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_decode_step_is_the_eager_one(backend):
    embed = torch.randn(500, 16)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for rows in (4, 7):
        logits, position = torch.randn(rows, 500), torch.arange(rows)
        for a, b in zip(
            compiled(logits, embed, position), step(logits, embed, position), strict=True
        ):
            assert torch.equal(a, b)


def test_compiled_gradients_are_the_eager_ones():
    def loss(ids, weights, embed):
        return soft_embedding(ids, weights, embed).square().sum()

    ids = torch.randint(-1, 500, (6, 3), dtype=torch.int32)
    gradients = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        weights, embed = torch.rand(6, 3, requires_grad=True), torch.randn(500, 8)
        run(ids, weights, embed.requires_grad_()).backward()
        gradients.append((weights.grad, embed.grad))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_bad_values_are_named_in_compiled_code_too():
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="position must be in"):
        compiled(torch.randn(2, 500), torch.randn(500, 4), torch.tensor([1, -1]))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_out_is_filled_and_returned(backend):
    logits, embed = torch.randn(5, 90), torch.randn(90, 7)
    settings = {
        "top_k": 6, "k_max": 8, "mode": torch.tensor([0, 1, 2, 3, 2]), **STATISTICS,
        "backend": backend,
    }  # fmt: skip
    logits[4, 0] = torch.nan
    expected = soft_token(logits, embed, **settings)
    out = room(5, 8, embed, fill=77.0)
    assert soft_token(logits, embed, out=out, **settings) is out
    for field in fields(out):
        a, b = getattr(out, field.name), getattr(expected, field.name)
        assert torch.equal(a.nan_to_num(-7), b.nan_to_num(-7)), field.name


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ids", torch.zeros(5, 8), "out.ids must be contiguous torch.int32"),
        ("gprime", torch.zeros(5, 9), "out.gprime must be contiguous"),
        ("logp", torch.zeros(8, 5).T, "out.logp must be contiguous"),
        ("lse", None, "out.lse is missing"),
        ("embed", torch.zeros(5, 7, device="meta"), "out.embed is on meta"),
    ],
)
def test_room_that_does_not_fit_is_named(name, value, message):
    logits, embed = torch.randn(5, 90), torch.randn(90, 7)
    out = replace(room(5, 8, embed), **{name: value})
    with pytest.raises(ValueError, match=message):
        soft_token(logits, embed, top_k=6, k_max=8, out=out, **STATISTICS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_hidden_is_the_head_and_the_step(dtype):
    hidden, head, bias = (torch.randn(*s).to(dtype) for s in ((6, 32), (400, 32), (400,)))
    options = {"bias": bias, "softcap": 20.0, "logit_scale": 0.7}
    settings = {"top_k": 10, "top_p": 0.95, "noise_scale": 0.0, "position": torch.arange(6)}
    out = soft_token(None, torch.eye(400), hidden=hidden, lm_head=head, **options, **settings)
    z = 0.7 * (hidden.double() @ head.double().T + bias.double())
    z = 20 * torch.tanh(z / 20)
    exact = soft_token(z, torch.eye(400, dtype=torch.double), **settings)
    if dtype == torch.float32:
        assert torch.equal(out.ids, exact.ids)
    # bf16 selects by rounded logits; what it selects is scored in fp32.
    scored = torch.where(out.ids >= 0, z.gather(1, out.ids.clamp(min=0).long()), -torch.inf)
    torch.testing.assert_close(out.logp.double(), scored.log_softmax(-1), rtol=1e-5, atol=1e-5)


def test_a_head_that_does_not_fit_is_named():
    hidden, head = torch.randn(2, 8), torch.randn(50, 8)
    for arguments, message in (
        ({"bias": torch.zeros(3)}, "bias must be"),
        ({"softcap": 0.0}, "softcap must be > 0"),
        ({"order": "joint"}, "takes the logits as they are"),
        ({"order": "top_p_first"}, "order must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            soft_token(torch.randn(2, 50), top_k=3, hidden=hidden, lm_head=head, **arguments)
    with pytest.raises(ValueError, match="need hidden"):
        soft_token(None, hidden=hidden, lm_head=head[:, :5], top_k=3)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_joint_top_p_is_a_share_of_the_vocabulary(backend):
    logits = torch.randn(40, 300)
    p = logits.double().softmax(-1)
    best, ids = p.sort(dim=-1, descending=True, stable=True)
    kept = (best.cumsum(-1) - best < 0.4) & (torch.arange(300) < 20)
    settings = {"top_k": 20, "top_p": 0.4, "noise": "none", "backend": backend}
    out = soft_token(logits, order="joint", **settings)
    assert torch.equal(out.n, kept.sum(-1).int())
    assert torch.equal(out.ids[:, :20], torch.where(kept, ids, -1)[:, :20].int())
    first = soft_token(logits, **settings)
    assert (out.n > first.n).any()
    discrete = soft_token(logits, order="joint", top_k=20, top_p=0.4, mode=1, k_max=4)
    assert (kept.gather(1, ids.argsort(-1).gather(1, discrete.token[:, None].long()))).all()
