"""The probability of the set that a discrete token was drawn from, against the dense softmax."""

import pytest
import torch
from logit_styles import logits_of

from softgrpo_kernels import soft_token
from softgrpo_kernels.extension import cpu_extension
from softgrpo_kernels.row_rules import DISCRETE, GREEDY, SKIP, SOFT

V = 700
# Listed candidates; the nucleus of the vocabulary, of more candidates than slots; min-p; all of it;
# greedy; a soft row that ends its phase, with its slots kept by eps; one that goes on; skipped.
ROWS = {
    "mode": torch.tensor([DISCRETE] * 6 + [GREEDY, SOFT, SOFT, SKIP]),
    "top_k": torch.tensor([5, 1, -1, 300, -1, -1, 0, 5, 5, 0]),
    "top_p": torch.tensor([0.95, 1, 0.6, 0.9, 1, 1, 1, 0.5, 0.95, 1]),
    "min_p": torch.tensor([0, 0, 0, 0, 0.02, 0, 0, 0, 0, 0]),
    "temperature": torch.tensor([0.8, 2, 1, 1.5, 1, 0.7, 1, 1, 1, 1]),
    "eps": 1e-6,
    "position": torch.arange(10),
}


@pytest.fixture(params=["reference", *(["cpu"] if cpu_extension() else [])])
def backend(request):
    torch.manual_seed(0)
    return request.param


@pytest.mark.parametrize("order", ["top_k_first", "joint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_leads_from_the_kept_set_to_the_vocabulary(backend, dtype, order):
    z = logits_of("plain", 10, V, dtype)
    free = soft_token(z, k_max=8, order=order, **ROWS)
    terminal = torch.full((10, 1), -1)
    terminal[7] = free.token[7]
    out = soft_token(
        z, k_max=8, order=order, terminal_ids=terminal, need_kept_mass=True, backend=backend, **ROWS
    )
    assert out.kept_mass.isnan().tolist() == [False] * 8 + [True, True]
    a = z[:8].double() / ROWS["temperature"][:8, None]
    full = a.log_softmax(-1).gather(1, out.token[:8, None].long())[:, 0]
    ours = out.token_logp[:8].double() + out.kept_mass[:8].double().log()
    torch.testing.assert_close(ours, full, rtol=0, atol=2e-5)  # eps adds 1e-6 to p
    assert out.kept_mass[5:7].tolist() == [1.0, 1.0]
    assert (out.kept_mass[:5] < 0.99).all()
    assert 0 < out.kept_mass[1] < 0.05


def test_recomputed_candidates_count_with_their_new_logits(backend):
    hidden, head = 0.5 * torch.randn(6, 64).bfloat16(), torch.randn(V, 64).bfloat16()
    logits = hidden @ head.T  # rounded to bf16
    out = soft_token(
        logits, top_k=5, top_p=0.9, mode=DISCRETE, position=torch.arange(6), hidden=hidden,
        lm_head=head, need_kept_mass=True, backend=backend,
    )  # fmt: skip
    exact, rounded = hidden.double() @ head.double().T, logits.double()
    best = rounded.sort(descending=True, stable=True).indices[:, :5]
    z = rounded.scatter(1, best, exact.gather(1, best))
    full = z.log_softmax(-1).gather(1, out.token[:, None].long())[:, 0]
    ours = out.token_logp.double() + out.kept_mass.double().log()
    torch.testing.assert_close(ours, full, rtol=0, atol=1e-5)
    # Neither the rounded logits nor a mixture of both would do.
    mixed = exact.gather(1, out.token[:, None].long())[:, 0] - rounded.logsumexp(-1)
    assert (mixed - full).abs().max() > 1e-3
