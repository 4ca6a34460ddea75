"""The shapes that benchmarks/kernels.py measures, and what each op is compared with."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _torch_chains import (
    authors_step,
    chunked_soft_logprob,
    naive_soft_logprob,
    naive_token_logprob,
    topk_step,
)
from torch import Tensor

from softgrpo_kernels import (
    gumbel_noise,
    linear_soft_logprob,
    linear_token_logprob,
    soft_embedding,
    soft_token,
)

# Inputs rotate through this much memory (16 copies at most), as they would in a decode.
ROTATION_BYTES = 1 << 26

# Takes the number of the turn.
Run = Callable[[int], Any]


@dataclass
class Case:
    """An op at one shape. bytes: least that must be read and written; flops: of its GEMMs."""

    op: str
    shape: dict[str, Any]
    bytes: int
    runs: dict[str, Run]
    flops: int = 0


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """All of them, smaller and fewer with `quick`."""
    batches, vocabularies = ((1, 8), (5000,)) if quick else ((1, 8, 64), (49152, 151936))
    for vocabulary in vocabularies:
        for dtype in (torch.bfloat16, torch.float32):
            for batch in batches:
                for k in (5, 30):
                    yield soft_token_case(device, batch, vocabulary, dtype, k)
    for batch in batches:
        yield from_hidden_case(device, batch, vocabularies[0])
    rows = 64 if quick else 4096
    for k in (5, 30):
        yield soft_embedding_case(device, rows, k)
    yield noise_case(device, rows)
    for n in (16,) if quick else (512, 4096):
        for k in (5, 30):
            yield from soft_logprob_cases(device, n, k, vocabularies[0])
    for n in (16,) if quick else (512,):
        yield token_logprob_case(device, n, vocabularies[0])


def soft_token_case(
    device: torch.device, batch: int, vocabulary: int, dtype: torch.dtype, k: int
) -> Case:
    """logits -> embedding of the next input; top-p 0.95, tau 0.1, H 576."""
    width, top_p, tau = 576, 0.95, 0.1
    size = batch * vocabulary * dtype.itemsize
    copies = max(1, min(16, ROTATION_BYTES // size))
    logits = [(3 * torch.randn(batch, vocabulary, device=device)).to(dtype) for _ in range(copies)]
    embed = torch.randn(vocabulary, width, device=device).to(dtype)
    position = torch.arange(batch, device=device)

    def turn(run: Callable[[Tensor], Any], i: int) -> Any:
        return run(logits[i % copies])

    chain = {"top_k": k, "top_p": top_p, "tau": tau}
    runs: dict[str, Callable[[Tensor], Any]] = {
        "softgrpo": lambda z: soft_token(
            z, embed, top_k=k, top_p=top_p, gumbel_tau=tau, position=position
        ),
        "torch: authors' chain": lambda z: authors_step(z, embed, **chain),
        "torch: top-k chain": lambda z: topk_step(z, embed, **chain),
        "torch.topk alone": lambda z: z.topk(k, dim=-1),
    }
    if device.type == "cuda" and importlib.util.find_spec("flashinfer"):
        from flashinfer import sampling

        runs["flashinfer: discrete token alone"] = lambda z: (
            sampling.top_k_top_p_sampling_from_logits(z.float(), k, top_p)
        )
    # Most rows mix a few embeddings; tau 0.1 leaves most weights at exactly 0.
    return Case(
        "soft_token",
        {"B": batch, "V": vocabulary, "k": k, "dtype": _name(dtype)},
        size + 2 * batch * width * dtype.itemsize,
        {name: partial(turn, run) for name, run in runs.items()},
    )


def from_hidden_case(device: torch.device, batch: int, vocabulary: int) -> Case:
    """The LM head and the step: what reading the weight once costs at least."""
    width = 576
    hidden = torch.randn(batch, width, device=device).bfloat16()
    head = torch.randn(vocabulary, width, device=device).bfloat16()
    options: dict[str, Any] = {"top_k": 5, "top_p": 0.95, "gumbel_tau": 0.1}
    linear = torch.nn.functional.linear
    return Case(
        "soft_token",
        {"B": batch, "V": vocabulary, "k": 5, "H": width, "dtype": "bfloat16"},
        2 * width * (vocabulary + batch),
        {
            "softgrpo": lambda i: soft_token(None, head, hidden=hidden, lm_head=head, **options),
            "linear, then soft_token": lambda i: soft_token(
                linear(hidden, head), head, hidden=hidden, lm_head=head, **options
            ),
            "torch: linear alone": lambda i: linear(hidden, head),
        },
        flops=2 * batch * width * vocabulary,
    )


def soft_embedding_case(device: torch.device, rows: int, k: int) -> Case:
    """Mixtures of rows of a table, as prefill and trainer rebuild them."""
    width, vocabulary = 576, 49152
    table = torch.randn(vocabulary, width, device=device).bfloat16()
    ids = torch.randint(vocabulary, (rows, k), device=device, dtype=torch.int32)
    weights = torch.rand(rows, k, device=device)
    narrow = weights.bfloat16()  # torch.embedding_bag takes no others
    return Case(
        "soft_embedding",
        {"rows": rows, "k": k, "H": width, "dtype": "bfloat16"},
        rows * (k + 1) * width * 2,
        {
            "softgrpo": lambda i: soft_embedding(ids, weights, table),
            "torch.embedding_bag": lambda i: torch.nn.functional.embedding_bag(
                ids, table, per_sample_weights=narrow, mode="sum"
            ),
        },
    )


def noise_case(device: torch.device, rows: int) -> Case:
    """The noise of recorded tokens again; torch's generator is no counter and makes other bits."""
    ids = torch.randint(49152, (rows, 30), device=device, dtype=torch.int32)
    keys = torch.arange(rows, device=device)
    return Case(
        "gumbel_noise",
        {"rows": rows, "k": 30},
        2 * ids.numel() * 4,
        {
            "softgrpo": lambda i: gumbel_noise(ids, i, keys, keys),
            "torch: -log Exp(1)": lambda i: (
                -torch.empty(ids.shape, device=device).exponential_().log()
            ),
        },
    )


def soft_logprob_cases(device: torch.device, n: int, k: int, vocabulary: int) -> Iterator[Case]:
    """Log-density of soft rows, forward alone and with backward."""
    hidden, head = _head(device, n, vocabulary)
    ids = torch.rand(n, vocabulary, device=device).topk(k).indices.int()
    gprime = torch.randn(n, k, device=device)
    full = torch.full((n,), k, device=device, dtype=torch.int32)
    kind = torch.ones(n, device=device, dtype=torch.uint8)

    def ours(grad_weight: str) -> Tensor:
        return linear_soft_logprob(
            hidden, head, ids, gprime, full, kind, ids[:, 0], grad_weight=grad_weight
        )

    def forward(logp: Callable[[], Tensor], i: int) -> Tensor:
        with torch.no_grad():
            return logp()

    def backward(logp: Callable[[], Tensor], i: int) -> None:
        hidden.grad = None
        if head.grad is None:
            head.grad = torch.zeros_like(head)
        logp().sum().backward()

    naive = partial(naive_soft_logprob, hidden, head, ids, gprime)
    chunked = partial(chunked_soft_logprob, hidden, head, ids, gprime)
    shape = {"N": n, "k": k, "V": vocabulary, "H": 576, "dtype": "bfloat16"}
    gathered = n * k * 576 * 2
    yield Case(
        "linear_soft_logprob",
        {"pass": "forward", **shape},
        gathered,
        {
            "softgrpo": partial(forward, partial(ours, "dense")),
            "torch: log_softmax over V": partial(forward, naive),
            "torch: the same in chunks": partial(forward, chunked),
        },
    )
    yield Case(
        "linear_soft_logprob",
        {"pass": "forward and backward", **shape},
        # The gathered rows twice; as many rows of dW, read and written.
        4 * gathered,
        {
            "softgrpo": partial(backward, partial(ours, "accumulate")),
            "softgrpo, dense dW": partial(backward, partial(ours, "dense")),
            "torch: log_softmax over V": partial(backward, naive),
            "torch: the same in chunks": partial(backward, chunked),
        },
    )


def token_logprob_case(device: torch.device, n: int, vocabulary: int) -> Case:
    """Log-probability of discrete rows, forward and backward."""
    hidden, head = _head(device, n, vocabulary)
    label = torch.randint(vocabulary, (n,), device=device)

    def backward(logp: Callable[..., Tensor], i: int) -> None:
        hidden.grad = head.grad = None
        logp(hidden, head, label).sum().backward()

    runs = {
        "softgrpo": partial(backward, linear_token_logprob),
        "torch: log_softmax over V": partial(backward, naive_token_logprob),
    }
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        runs["Liger"] = partial(backward, lambda x, w, y: loss(w, x, y))
    if device.type == "cuda" and importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        runs["CCE"] = partial(backward, partial(linear_cross_entropy, reduction="sum"))
    return Case(
        "linear_token_logprob",
        {"N": n, "V": vocabulary, "H": 576, "dtype": "bfloat16"},
        3 * vocabulary * 576 * 2,
        runs,
        # Logits forward and again backward, dX, dW.
        flops=4 * 2 * n * vocabulary * 576,
    )


def _head(device: torch.device, n: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    hidden = torch.randn(n, 576, device=device).bfloat16().requires_grad_()
    head = (0.05 * torch.randn(vocabulary, 576, device=device)).bfloat16().requires_grad_()
    return hidden, head


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
