"""Attention of packed groups against plain attention with a mask, in double precision."""

import random

import pytest
import torch

from softgrpo_engine.ops import cpu
from softgrpo_engine.ops.extension import cpu_extension
from softgrpo_engine.training.group_attention import GroupAttention

# (prompt lengths, response lengths of every group)
LAYOUTS = {
    "one prompt alone": ([7], [[]]),
    "single tokens": ([1, 1], [[1, 1], [1]]),
    "empty responses": ([3, 5, 2], [[0, 4, 0], [0, 0], [2, 0]]),
    # Of 16 rows and keys, a register or two of C++; and their neighbours.
    "edges of registers": ([8, 16], [[5, 4, 3, 2, 1], [16, 8, 9, 17]]),
    "long prompt, short responses": ([70], [[3, 1, 2, 3]]),
    "short prompt, long responses": ([2], [[70, 33]]),
    # Longer than the blocks of C++ (48 rows, 256 keys).
    "several blocks": ([600], [[300, 20]]),
}
HEADS = [(6, 2), (4, 4), (4, 1)]
HEAD_DIM = 8
needs_cpp = pytest.mark.skipif(cpu_extension() is None, reason="the extension is not built")


@pytest.fixture(params=["plain", "portable", "avx2", "best"])
def dtype(request):
    """float64 by PyTorch, float32 by C++ for each instruction set."""
    if request.param == "plain":
        yield torch.float64
        return
    if cpu_extension() is None:
        pytest.skip("the extension is not built")
    cpu_extension().limit_isa(["portable", "avx2", "best"].index(request.param))
    yield torch.float32
    cpu_extension().limit_isa(2)


def dense(prompt_lens, response_lens, heads, kv_heads, qkv, rope):
    """softmax(QK' / sqrt(D)) V; a token sees its span up to itself, and the prompt of its group."""
    group, span, is_prompt = [], [], []
    for g, (prompt, responses) in enumerate(zip(prompt_lens, response_lens, strict=True)):
        for i, length in enumerate([prompt, *responses]):
            group += [g] * length
            span += [(g, i)] * length
            is_prompt += [i == 0] * length

    def sees(i, j):
        return j <= i and group[i] == group[j] and (is_prompt[j] or span[i] == span[j])

    mask = torch.tensor([[sees(i, j) for j in range(len(span))] for i in range(len(span))])
    heads_THD = qkv.view(len(span), -1, HEAD_DIM)
    q, k, v = heads_THD.split([heads, kv_heads, kv_heads], dim=1)
    cos, sin = (part[:, None] for part in rope)

    def rotate(x):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (rotate(k), v))
    scores = torch.einsum("thd,shd->hts", rotate(q), k) / HEAD_DIM**0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v).flatten(1)


def compare(prompt_lens, response_lens, heads, kv_heads, dtype):
    generator = torch.Generator().manual_seed(1)
    tokens = sum(prompt_lens) + sum(map(sum, response_lens))

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    qkv = draw(tokens, (heads + 2 * kv_heads) * HEAD_DIM)
    rope = draw(tokens, HEAD_DIM), draw(tokens, HEAD_DIM)
    direction = draw(tokens, heads * HEAD_DIM)
    lens = prompt_lens, response_lens, heads, kv_heads
    results = []
    for attend, used in (
        (lambda qkv, rope: GroupAttention(*lens)(0, qkv, rope), dtype),
        (lambda qkv, rope: dense(*lens, qkv, rope), torch.float64),
    ):
        leaf = qkv.to(used).requires_grad_()
        out = attend(leaf, tuple(part.to(used) for part in rope))
        results.append((out.detach(), *torch.autograd.grad(out, leaf, direction.to(used))))
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == dtype
        error = (ours.double() - expected).abs().max()
        assert error <= (1e-10 if dtype == torch.float64 else 5e-6) * expected.abs().max()


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_dense_attention_with_gradients(name, heads, kv_heads, dtype):
    compare(*LAYOUTS[name], heads, kv_heads, dtype)


def test_equals_dense_attention_on_random_layouts(dtype):
    draw = random.Random(0)
    for _ in range(15):
        prompt_lens = [draw.randint(1, 20) for _ in range(draw.randint(1, 4))]
        response_lens = [
            [draw.choice([0, 1, draw.randint(1, 40)]) for _ in range(draw.randint(0, 5))]
            for _ in prompt_lens
        ]
        compare(prompt_lens, response_lens, *draw.choice(HEADS), dtype)


@needs_cpp
def test_the_bits_do_not_hang_on_the_threads():
    attention, found = GroupAttention([30, 9], [[70, 20, 5], [40]], 6, 2), []
    torch.manual_seed(0)
    qkv = torch.randn(174, 10 * HEAD_DIM).bfloat16()
    rope = torch.randn(174, HEAD_DIM), torch.randn(174, HEAD_DIM)
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        leaf = qkv.clone().requires_grad_()
        out = attention(0, leaf, rope)
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaf)))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_cpp
@pytest.mark.parametrize(
    ("spans", "groups", "message"),
    [
        ([[0, 3, 0, 0], [3, 3, 0, 3]], [0, 2], r"spans\[1\] lies outside of the tokens"),
        ([[0, 3, 0, 0], [3, 2, -1, 3]], [0, 2], r"spans\[1\]"),
        ([[0, 3, 0, 0], [3, 2, 0, 2]], [0, 2], r"spans\[1\]"),  # not the whole prompt
        ([[0, 3, 0, 0], [3, 2, 0, 3]], [0, 3], r"groups\[0\] has no spans"),
    ],
)
def test_spans_that_do_not_fit_are_refused(spans, groups, message):
    q = torch.randn(5, 2, HEAD_DIM)
    with pytest.raises(ValueError, match=message):
        cpu.group_attention(q, q, q, torch.tensor(spans), torch.tensor(groups))


@pytest.mark.parametrize("longest", [30, 300])
def test_bf16_is_as_near_as_rounding_allows(longest):
    """Not further from the exact result than plain bf16 attention of each span is."""
    prompt_lens, response_lens = [40], [[longest, 9, 30]]
    generator = torch.Generator().manual_seed(2)
    tokens = 79 + longest
    qkv = torch.randn(tokens, 10 * HEAD_DIM, generator=generator).bfloat16().requires_grad_()
    rope = torch.ones(tokens, HEAD_DIM), torch.zeros(tokens, HEAD_DIM)
    exact_rope = tuple(part.double() for part in rope)
    exact = dense(prompt_lens, response_lens, 6, 2, qkv.double(), exact_rope)
    ours = GroupAttention(prompt_lens, response_lens, 6, 2)(0, qkv, rope)
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().max() < 2 * (exact.bfloat16() - exact).abs().max() + 2**-8
    direction = torch.randn(tokens, 6 * HEAD_DIM, generator=generator).bfloat16()
    (gradient,) = torch.autograd.grad((exact * direction).sum(), qkv)
    (our_gradient,) = torch.autograd.grad(ours, qkv, direction)
    assert (our_gradient - gradient).norm() < 2**-7 * gradient.norm()


def test_memory_is_linear_in_the_tokens(peak_memory, one_thread):
    """Four times the tokens take four times the memory; scores would take sixteen times. One
    thread: flash attention has buffers of a constant size for each."""

    def step(tokens):
        attention = GroupAttention([tokens // 2], [[tokens // 4, tokens // 4]], 4, 2)
        qkv = torch.zeros(tokens, 8 * HEAD_DIM, requires_grad=True)
        rope = torch.ones(tokens, HEAD_DIM), torch.zeros(tokens, HEAD_DIM)
        attention(0, qkv, rope).sum().backward()

    small, large = (peak_memory(lambda t=t: step(t)) for t in (1024, 4096))
    assert 3 < large / small < 5
    # What it takes is a few times its input, and scores alone would be more.
    assert large < 20 * 4096 * 8 * HEAD_DIM * 4 < 4 * 4 * 4096 * 4096


@needs_cpp
@pytest.mark.parametrize("name", ["edges of registers", "several blocks"])
def test_bfloat16_is_rounded_only_where_it_is_kept(name):
    heads, kv_heads = 4, 2
    prompt_lens, response_lens = LAYOUTS[name]
    tokens = sum(prompt_lens) + sum(map(sum, response_lens))
    torch.manual_seed(1)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * HEAD_DIM).bfloat16()
    rope = torch.ones(tokens, HEAD_DIM), torch.zeros(tokens, HEAD_DIM)  # no rotation: no rounding
    direction = torch.randn(tokens, heads * HEAD_DIM).bfloat16()
    results = []
    for x, r in ((qkv, rope), (qkv.double(), tuple(part.double() for part in rope))):
        x.requires_grad_()
        out = GroupAttention(prompt_lens, response_lens, heads, kv_heads)(0, x, r)
        results += [(out.detach(), *torch.autograd.grad(out, x, direction.to(x.dtype)))]
    for ours, exact in zip(*results, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - exact).norm() < 2**-8 * exact.norm()
