"""The Triton passes of the whole-vocabulary log-probability, against autograd in fp64."""

import pytest
import torch

from softgrpo_kernels import linear_logprob_passes as plain
from softgrpo_kernels import linear_logprob_slices
from softgrpo_kernels.gpu import linear_logprob as gpu
from softgrpo_kernels.linear_logprob_slices import LogitMap, TokenGradients

ROWS, VOCABULARY, BEGINS = 3, 4500, (0, 2500)  # two slices, the second of another width


@pytest.mark.parametrize("need_entropy", [False, True])
@pytest.mark.parametrize(("with_bias", "softcap", "scale"), [(False, None, 1.0), (True, 5.0, 0.7)])
def test_slices_add_up_and_differentiate(device, with_bias, softcap, scale, need_entropy):
    dots = (3 * torch.randn(ROWS, VOCABULARY, device=device)).requires_grad_()
    bias = torch.randn(VOCABULARY, device=device) if with_bias else None
    temperature = torch.tensor([0.7, 1.0, 2.0], device=device)
    label = torch.tensor([0, 2499, 4499], device=device)
    z = scale * (dots.double() + (0 if bias is None else bias.double()))
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp = (z / temperature[:, None].double()).log_softmax(-1)
    lse = (z / temperature[:, None].double()).logsumexp(-1)
    chosen, entropy = logp.gather(1, label[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    weights = torch.randn(3, ROWS, device=device).double()
    loss = (weights[0] * chosen + weights[1] * lse).sum()
    loss = loss + (weights[2] * entropy).sum() if need_entropy else loss
    loss.backward()

    state = torch.zeros(4, ROWS, device=device)
    state[0] = -torch.inf
    options = {"softcap": softcap, "logit_scale": scale}
    slices = list(zip(BEGINS, (*BEGINS[1:], VOCABULARY), strict=True))
    for begin, end in slices:
        part = None if bias is None else bias[begin:end].contiguous()
        gpu.accumulate(
            dots.detach()[:, begin:end], begin, part, temperature, label, state,
            need_entropy=need_entropy, **options,
        )  # fmt: skip
    top, mass, weighted, picked = state
    found_lse = top + mass.log()
    torch.testing.assert_close(found_lse.double(), lse.detach(), rtol=1e-6, atol=1e-5)
    found = (picked - found_lse).double()
    torch.testing.assert_close(found, chosen.detach(), rtol=1e-6, atol=1e-5)
    found_entropy = found_lse - weighted / mass
    if need_entropy:
        torch.testing.assert_close(found_entropy.double(), entropy.detach(), rtol=1e-5, atol=1e-5)
    for begin, end in slices:
        part = None if bias is None else bias[begin:end].contiguous()
        d_logp, d_lse, d_entropy = weights.float()
        grad = gpu.differentiate_(
            dots.detach()[:, begin:end].clone(), begin, part, temperature, label, found_lse,
            found_entropy, d_logp, d_lse, d_entropy if need_entropy else None, **options,
        )  # fmt: skip
        torch.testing.assert_close(grad, dots.grad[:, begin:end], rtol=2e-5, atol=2e-6)


def test_the_whole_is_that_of_the_plain_passes(device, monkeypatch):
    """GEMMs and passes together, in several slices, forward and backward."""
    monkeypatch.setattr(linear_logprob_slices, "_CHUNK_ELEMENTS", 2048)
    hidden, head = torch.randn(4, 8), torch.randn(700, 8)
    label = torch.tensor([3, 699, 256, 0])
    logit_map = LogitMap(torch.randn(700), torch.full((4, 1), 0.8), 6.0, 0.9)
    grads = TokenGradients(*torch.randn(3, 4))

    def run(module, where):
        moved = [x.to(where) for x in (hidden, head, label)]
        mapped = logit_map._replace(
            bias=logit_map.bias.to(where), temperature=logit_map.temperature.to(where)
        )
        results = module.token_logprob(*moved, mapped, need_entropy=True)
        weight, bias = torch.ones(700, 8, device=where), torch.ones(700, device=where)
        d_hidden = module.token_logprob_backward(
            TokenGradients(*(g.to(where) for g in grads)), *moved, mapped, *results[1:],
            need_hidden=True, d_weight=weight, d_bias=bias,
        )  # fmt: skip
        return *results, d_hidden, weight, bias

    for a, b in zip(run(gpu, device), run(plain, "cpu"), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5)
