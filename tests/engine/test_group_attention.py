"""Attention of packed groups against one dense masked softmax in float64."""

import pytest
import torch

from softgrpo_engine.group_attention import GroupAttention

# Tokens of the prompt, of each response: empty ones, single tokens, lengths at both sides of the
# factor of two that shares a rectangle, a group without responses.
GROUPS = {
    "one": ([5], [[4, 3]]),
    "uneven": ([7, 1, 12], [[1, 2, 3, 4, 5, 8, 9, 16, 17], [6], [33, 1]]),
    "empty": ([3, 4], [[0, 5, 0], []]),
    "single": ([1], [[1]]),
}
HEADS = {"all": (4, 4), "grouped": (6, 2), "one": (3, 1)}
DIM = 8


def mask_of(prompt_lens, response_lens):
    """Which key [T] each query [T] sees, and the position of each token in its own sequence."""
    owner, positions = [], []
    for group, (prompt, lens) in enumerate(zip(prompt_lens, response_lens, strict=True)):
        owner += [(group, -1)] * prompt
        positions += range(prompt)
        for response, length in enumerate(lens):
            owner += [(group, response)] * length
            positions += range(prompt, prompt + length)
    total = len(owner)
    mask = torch.zeros(total, total, dtype=torch.bool)
    for q in range(total):
        for k in range(total):
            own = owner[q] == owner[k] and positions[k] <= positions[q]
            prompt = owner[q][0] == owner[k][0] and owner[k][1] == -1 and owner[q][1] != -1
            mask[q, k] = own or prompt
    return mask, torch.tensor(positions)


def rope_of(positions):
    angles = positions[:, None] * 0.3 ** torch.arange(DIM // 2, dtype=torch.float64)
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def dense(qkv, rope, mask, heads, kv_heads):
    q, k, v = qkv.view(len(qkv), -1, DIM).split([heads, kv_heads, kv_heads], dim=1)

    def rotated(x):
        first, second = x.chunk(2, dim=-1)
        return x * rope[0][:, None] + torch.cat((-second, first), -1) * rope[1][:, None]

    q, k = rotated(q), rotated(k).repeat_interleave(heads // kv_heads, dim=1)
    v = v.repeat_interleave(heads // kv_heads, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / DIM**0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_and_gradients(groups, heads, dtype):
    prompt_lens, response_lens = GROUPS[groups]
    num_heads, kv_heads = HEADS[heads]
    mask, positions = mask_of(prompt_lens, response_lens)
    torch.manual_seed(0)
    qkv = torch.randn(len(mask), (num_heads + 2 * kv_heads) * DIM, dtype=torch.float64)
    weight = torch.randn(len(mask), num_heads * DIM, dtype=torch.float64)
    exact = qkv.clone().requires_grad_()
    expected = dense(exact, rope_of(positions), mask, num_heads, kv_heads)
    (expected * weight).sum().backward()
    ours = qkv.to(dtype).requires_grad_()
    attention = GroupAttention(prompt_lens, response_lens, num_heads, kv_heads)
    out = attention(0, ours, rope_of(positions))
    (out * weight.to(dtype)).sum().backward()
    close = 1e-12 if dtype == torch.float64 else 2e-6
    assert (out.double() - expected).abs().max() < close
    assert (ours.grad.double() - exact.grad).abs().max() < 10 * close


def test_memory_is_linear_in_the_tokens():
    """What is kept for the backward pass, and the largest tensor on the way, per token."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    largest = []
    for scale in (1, 4):
        prompt, lens = [64 * scale], [[32 * scale] * 4]
        total = prompt[0] + sum(lens[0])
        qkv = torch.randn(total, 8 * DIM, requires_grad=True)
        rope = tuple(part.float() for part in rope_of(torch.arange(total)))
        with Largest() as seen:
            GroupAttention(prompt, lens, 4, 2)(0, qkv, rope).sum().backward()
        largest.append(seen.numel / total)
    assert largest[1] <= 1.05 * largest[0]
