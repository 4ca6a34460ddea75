"""The soft step: every back end against a plain sort in fp64, and what a row may depend on."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from logit_styles import logits_of

from softgrpo_kernels import SoftToken, gumbel_noise, soft_embedding, soft_token, soft_weights
from softgrpo_kernels.extension import cpu_extension

STATISTICS = {"need_lse": True, "need_entropy": True, "need_kept_mass": True}
FLOATS = ("gprime", "weights", "logp", "token_logp", "embed", "lse", "entropy", "kept_mass")
BACKENDS = ["reference"] if cpu_extension() is None else ["reference", "cpu"]
needs_extension = pytest.mark.skipif(cpu_extension() is None, reason="no C++ extension")
GREEDY, DISCRETE, SOFT, SKIP = range(4)
FIELDS = [field.name for field in fields(SoftToken)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def oracle(z, *, temperature, top_k, top_p, min_p=0.0):
    """Kept ids in order and their log p, by a stable sort of one row in fp64."""
    z = z if z.dtype == torch.float64 else z.float()
    # The one fp32 operation of the contract: a = z / T.
    a = (z.numpy() / np.float32(temperature)).astype(np.float64)
    order = np.argsort(-a, kind="stable")
    order = order[a[order] > -np.inf]
    if top_k > 0:
        order = order[:top_k]
    p = np.exp(a[order] - a[order[0]])
    p /= p.sum()
    before = np.concatenate([[0.0], np.cumsum(p)[:-1]])
    # Where rounding would decide, the test says nothing.
    assert top_p >= 1 or np.abs(before - top_p).min() > 1e-7
    kept = ((before < top_p) | (top_p >= 1)) & (p >= min_p * p[0])
    kept[0] = True
    return order[kept], np.log(p[kept] / p[kept].sum())


STYLES = ["plain", "peaked", "equal", "integers", "signed zeros", "masked", "one", "negative"]


@pytest.mark.parametrize("style", STYLES)
# One token; less than k; one vector; around a tile; not a multiple of 16; many tiles.
@pytest.mark.parametrize("vocabulary", [1, 3, 16, 255, 257, 5001])
def test_candidates_are_those_of_a_stable_sort(backend, style, vocabulary):
    settings = {"temperature": 0.7, "top_k": 9, "top_p": 0.913}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        # Rows further apart than they are long, at odd distances.
        z = logits_of(style, 4, vocabulary + 3, dtype)[:, 3:]
        out = soft_token(z, **settings, noise_scale=0.0, k_max=16, backend=backend)
        for row in range(4):
            ids, logp = oracle(z[row], **settings)
            n = len(ids)
            assert out.n[row] == n
            assert out.ids[row, :n].tolist() == ids.tolist()
            np.testing.assert_allclose(out.gprime[row, :n], logp, rtol=2e-6, atol=2e-6)
            assert (out.ids[row, n:] == -1).all()
            assert (out.gprime[row, n:] == -torch.inf).all()
            assert not out.weights[row, n:].any()


@needs_extension
@pytest.mark.parametrize("isa", [0, 1, 2])
@pytest.mark.parametrize("style", STYLES)
def test_cpp_equals_the_reference(style, isa):
    cpu_extension().limit_isa(isa)
    mode = torch.tensor([GREEDY, DISCRETE, SOFT, SKIP, SOFT, DISCRETE, DISCRETE])
    parameters = {
        "mode": mode,
        "top_k": torch.tensor([0, 7, 5, 0, 32, -1, 40]),
        "top_p": torch.tensor([1, 0.9, 0.95, 1, 1, 0.8, 0.9]),
        "min_p": torch.tensor([0, 0, 0, 0, 0.01, 0.002, 0]),
        "temperature": torch.tensor([0, 0.7, 1, 0, 1.3, 1, 0.8]),
        "gumbel_tau": torch.tensor([0.1, 0.1, 0.1, 0.1, 1, 1, 1]),
        "weight_floor": torch.tensor([0, 0, 0.1, 0, 0.01, 1, 1]),
        "eps": torch.tensor([0, 0, 1e-6, 0, 0, 0, 0]),
        "noise_scale": torch.tensor([1, 1, 0.5, 1, 2, 2, 2]),
        "noise_clamp": (-1.5, 3.0),
        "seed": 2**41 + 5,
        "position": torch.arange(7),
        "uid": torch.arange(7) + 2**32 - 7,
        "terminal_ids": torch.arange(350).view(7, 50) % 257,
        **STATISTICS,
    }
    try:
        for vocabulary in (16, 257, 3001):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                z, embed = logits_of(style, 7, vocabulary, dtype), torch.randn(vocabulary, 20)
                expected = soft_token(z, embed, **parameters, backend="reference")
                out = soft_token(z, embed, **parameters, backend="cpu")
                for name in ("ids", "n", "token", "kind", "valid"):
                    assert torch.equal(getattr(out, name), getattr(expected, name)), name
                for name in FLOATS:
                    torch.testing.assert_close(
                        getattr(out, name),
                        getattr(expected, name),
                        rtol=1e-6,
                        atol=5e-6,
                        equal_nan=True,
                        msg=name,
                    )
    finally:
        cpu_extension().limit_isa(2)


def test_gprime_is_logp_plus_the_noise_and_gives_weights_and_embedding(backend):
    z, embed = logits_of("plain", 40, 600), torch.randn(600, 24).bfloat16()
    keys = {"seed": 3, "position": torch.arange(40), "uid": 7, "stream": 1}
    out = soft_token(z, embed, top_k=12, top_p=0.95, gumbel_tau=0.7, **keys, backend=backend)
    noise = gumbel_noise(out.ids, *keys.values())
    live = out.ids >= 0
    assert torch.equal(out.gprime[live], (out.logp + noise)[live])
    torch.testing.assert_close(out.logp.exp().sum(-1), torch.ones(40), atol=2e-6, rtol=0)
    assert torch.equal(out.gprime, out.gprime.sort(-1, descending=True).values)
    assert torch.equal(out.token, out.ids[:, 0])
    assert torch.equal(out.token_logp, out.logp[:, 0])
    assert (out.kind == 1).all()
    # What the trainer computes from the record, to the bit.
    assert torch.equal(out.weights, soft_weights(out.gprime, out.kind, 0.7))
    assert torch.equal(out.embed, soft_embedding(out.ids, out.weights, embed))


def test_scale_and_clamp_of_the_noise_are_for_soft_rows(backend):
    z = logits_of("plain", 400, 50)
    mode = 1 + torch.arange(400) % 2
    out = soft_token(
        z, top_k=8, noise_scale=0.5, noise_clamp=(-0.3, 0.4), position=torch.arange(400),
        mode=mode, backend=backend,
    )  # fmt: skip
    noise = gumbel_noise(out.ids, 0, torch.arange(400), 0)
    soft = (mode == SOFT)[:, None]
    expected = torch.where(soft, 0.5 * noise.clamp(-0.3, 0.4), noise)
    live = out.ids >= 0
    assert torch.equal(out.gprime[live], (out.logp + expected)[live])
    per_row = soft_token(
        z, top_k=8, noise_scale=0.5, noise_clamp=torch.tensor([[-0.3, 0.4]]).expand(400, 2),
        position=torch.arange(400), mode=mode, backend=backend,
    )  # fmt: skip
    assert torch.equal(per_row.gprime, out.gprime)


@pytest.mark.parametrize(
    "limits",
    [{}, {"top_p": 0.8317}, {"top_k": 50, "top_p": 0.913}, {"min_p": 0.05}, {"top_k": 10**6}],
)
@pytest.mark.parametrize("style", ["plain", "integers", "masked", "equal"])
def test_whole_vocabulary_rows_record_the_token_alone(backend, style, limits):
    z = logits_of(style, 5, 700)
    out = soft_token(
        z, temperature=0.9, **limits, mode=DISCRETE, uid=torch.arange(5), k_max=4, backend=backend
    )
    settings = {"top_k": -1, "top_p": 1.0} | limits
    for row in range(5):
        ids, logp = oracle(z[row], temperature=0.9, **settings)
        noise = gumbel_noise(torch.from_numpy(ids), 0, 0, row).numpy()
        winner = np.argmax(logp + noise)
        assert out.token[row] == ids[winner]
        assert out.token_logp[row] == pytest.approx(logp[winner], abs=2e-6)
        assert out.gprime[row, 0] == pytest.approx(logp[winner] + noise[winner], abs=4e-6)
    assert (out.n == 1).all()
    assert (out.ids[:, 1:] == -1).all()
    assert not out.kind.any()


def test_greedy_takes_the_first_of_the_best(backend):
    z = logits_of("integers", 6, 900)
    out = soft_token(
        z, torch.eye(900), mode=GREEDY, temperature=0.0, need_lse=True, backend=backend
    )
    first = torch.tensor([int((row == row.max()).nonzero()[0]) for row in z])
    assert torch.equal(out.token.long(), first)
    expected = z.double().log_softmax(-1)[torch.arange(6), first].float()
    torch.testing.assert_close(out.token_logp, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(out.embed, torch.eye(900)[first])
    assert (out.n == 1).all()
    torch.testing.assert_close(out.lse, z.logsumexp(-1), rtol=1e-6, atol=1e-6)


def test_eps_keeps_every_candidate_with_noise(backend):
    z = torch.tensor([[5.0, 4.0, 0.0, -3.0, -4.0, -torch.inf]])
    out = soft_token(z, top_k=5, top_p=0.9, eps=1e-6, k_max=8, backend=backend)
    order = out.ids[0, :5].argsort()
    p = torch.softmax(z[0, :2].double(), -1)
    expected = torch.cat([torch.log(p + 1e-6), torch.full((3,), 1e-6).double().log()])
    torch.testing.assert_close(out.logp[0, :5][order].double(), expected, rtol=1e-6, atol=1e-6)
    assert out.ids[0].tolist().count(-1) == 3
    assert out.n.tolist() == [5]
    # A masked token stays out; discrete rows know no eps.
    assert soft_token(z, top_k=6, eps=1e-6, k_max=8, backend=backend).n.tolist() == [5]
    discrete = soft_token(z, top_k=5, top_p=0.9, eps=1e-6, mode=DISCRETE, backend=backend)
    assert discrete.n.tolist() == [2]


def test_terminal_tokens_end_the_soft_phase(backend):
    z, embed = logits_of("plain", 50, 30), torch.randn(30, 8)
    settings = {"top_k": 6, "gumbel_tau": 2.0, "position": torch.arange(50), "backend": backend}
    free = soft_token(z, embed, **settings)
    terminal = torch.full((50, 3), -1)
    terminal[::2, 1] = free.token[::2].long()
    terminal[1::2, 0] = (free.token[1::2].long() + 1) % 30
    out = soft_token(z, embed, **settings, terminal_ids=terminal)
    assert out.kind.tolist() == [0, 1] * 25
    assert torch.equal(out.ids, free.ids)
    assert torch.equal(out.gprime, free.gprime)
    assert (out.weights[::2, 0] == 1).all()
    assert not out.weights[::2, 1:].any()
    assert torch.equal(out.embed[::2], embed[out.token[::2].long()])
    assert torch.equal(out.embed[1::2], free.embed[1::2])


def test_refinement_selects_by_logits_and_scores_by_dot_products(backend):
    hidden, head = torch.randn(8, 64).bfloat16(), torch.randn(3000, 64).bfloat16()
    logits = hidden @ head.T  # rounded to bf16: ties, and an error of up to 2^-9
    out = soft_token(
        logits, top_k=10, top_p=0.95, temperature=4.0, noise_scale=0.0, hidden=hidden,
        lm_head=head, backend=backend,
    )  # fmt: skip
    for row in range(8):
        order = np.argsort(-logits[row].float().numpy(), kind="stable")[:10]
        exact = torch.full((3000,), -torch.inf, dtype=torch.double)
        exact[order] = head[order].double() @ hidden[row].double()
        ids, logp = oracle(exact, temperature=4.0, top_k=10, top_p=0.95)
        assert out.ids[row, : len(ids)].tolist() == ids.tolist()
        np.testing.assert_allclose(out.logp[row, : len(ids)], logp, atol=1e-5)


def test_bad_rows_are_marked_and_harm_nobody(backend):
    z = logits_of("plain", 6, 300)
    alone = soft_token(z[5:], torch.ones(300, 4), top_k=5, backend=backend)
    z[0, 299], z[1, 0], z[2] = torch.nan, torch.inf, -torch.inf
    mode = torch.tensor([SOFT, DISCRETE, SOFT, SKIP, GREEDY, SOFT])
    z[3] = torch.nan  # not read
    out = soft_token(z, torch.ones(300, 4), top_k=5, mode=mode, backend=backend, **STATISTICS)
    assert out.valid.tolist() == [False] * 3 + [True] * 3
    assert out.token[:4].tolist() == [-1] * 4
    assert out.n.tolist()[:4] == [0] * 4
    assert (out.ids[:4] == -1).all()
    assert (out.gprime[:4] == -torch.inf).all()
    assert not out.weights[:4].any()
    assert not out.embed[:4].any()
    assert out.lse[:4].isnan().all()
    assert torch.equal(out.gprime[5], alone.gprime[0])


def mixed_batch(rows):
    """Rows of every mode, with different parameters."""
    index = torch.arange(rows)
    return {
        "logits": logits_of("integers", rows, 2003, torch.bfloat16),
        "mode": index % 4,
        "top_k": torch.where(index % 3 == 0, 5, 30),
        "top_p": torch.where(index % 5 == 0, 1.0, 0.9),
        "temperature": 0.5 + 0.1 * (index % 7),
        "position": index * 3,
        "uid": index * 1001,
    }


def test_a_row_does_not_depend_on_its_batch(backend):
    batch = mixed_batch(17)
    batch["top_k"][5] = -1  # a discrete row over the whole vocabulary
    embed = torch.randn(2003, 40).bfloat16()
    options = {**STATISTICS, "backend": backend}
    together = soft_token(embed=embed, **batch, **options)
    shuffled = torch.randperm(17)
    moved = soft_token(embed=embed, **{k: v[shuffled] for k, v in batch.items()}, **options)
    for name in FIELDS:
        a, b = getattr(together, name), getattr(moved, name)
        assert torch.equal(a[shuffled].nan_to_num(-7), b.nan_to_num(-7)), name
    for row in range(17):
        alone = soft_token(
            embed=embed, **{k: v[row : row + 1] for k, v in batch.items()}, **options
        )
        for name in FIELDS:
            a, b = getattr(together, name)[row], getattr(alone, name)[0]
            assert torch.equal(a.nan_to_num(-7), b.nan_to_num(-7)), name


@needs_extension
def test_results_do_not_depend_on_the_threads():
    batch, embed = mixed_batch(33), torch.randn(2003, 40)
    before = torch.get_num_threads()
    try:
        outs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(soft_token(embed=embed, **batch, **STATISTICS))
    finally:
        torch.set_num_threads(before)
    for name in FIELDS:
        a, b, c = (getattr(out, name).nan_to_num(-7) for out in outs)
        assert torch.equal(a, b), name
        assert torch.equal(a, c), name


@needs_extension
def test_every_output_is_written():
    """torch.empty filled with NaN and the largest integers, as this mode does."""
    batch, embed = mixed_batch(16), torch.randn(2003, 8)
    expected = soft_token(embed=embed, **batch, backend="reference")
    torch.use_deterministic_algorithms(True)
    try:
        out = soft_token(embed=embed, **batch, backend="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    for name in ("ids", "n", "token", "kind", "valid"):
        assert torch.equal(getattr(out, name), getattr(expected, name)), name
    for name in ("gprime", "weights", "logp", "token_logp", "embed"):
        torch.testing.assert_close(
            getattr(out, name), getattr(expected, name), rtol=1e-6, atol=1e-6
        )


def test_statistics_of_the_whole_vocabulary(backend):
    z = logits_of("masked", 4, 1000)
    out = soft_token(z, top_k=3, temperature=0.8, need_lse=True, need_entropy=True, backend=backend)
    a = z.double() / torch.tensor(0.8).double()
    torch.testing.assert_close(out.lse.double(), a.logsumexp(-1), rtol=1e-6, atol=1e-6)
    entropy = torch.distributions.Categorical(logits=a.clamp(min=-1e4)).entropy()
    torch.testing.assert_close(out.entropy.double(), entropy, rtol=1e-5, atol=1e-5)


def test_fp64_is_the_oracle_of_fp32():
    z = logits_of("plain", 30, 400)
    out, exact = (soft_token(x, top_k=9, top_p=0.9, position=3) for x in (z, z.double()))
    assert exact.gprime.dtype == torch.float64
    assert torch.equal(out.ids, exact.ids)
    for name in ("gprime", "logp"):
        torch.testing.assert_close(
            getattr(out, name).double(), getattr(exact, name), rtol=1e-6, atol=1e-6
        )


def test_empty_batch(backend):
    out = soft_token(torch.empty(0, 7), torch.randn(7, 3), top_k=2, backend=backend)
    assert out.ids.shape == (0, 2)  # as many slots as top_k
    assert out.embed.shape == (0, 3)
