"""The sampling ops as `torch.ops.softgrpo_kernels.*`: one meaning, a back end for every device.

CPU tensors go to C++ where it is built, CUDA tensors (ROCm's too) to Triton, all others to plain
PyTorch, as do dtypes that the faster back ends do not know. `soft_token` writes into the tensors it
is given, so that the same op serves `out=`, CUDA graphs and `torch.compile`.

`torch.library.Library` and not `custom_op`: a call costs a decode step half as much.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from softgrpo_kernels import cpu, reference
from softgrpo_kernels.checks import check_counter_words
from softgrpo_kernels.extension import cpu_extension
from softgrpo_kernels.indexed_dot import LIBRARY
from softgrpo_kernels.rows import RowParameters
from softgrpo_kernels.step import LMHead, SoftToken

LIBRARY.define(
    "soft_token(Tensor? logits, Tensor? embed, Tensor floats, Tensor ints, Tensor? terminal_ids, "
    "Tensor? hidden, Tensor? lm_head, Tensor? bias, float? softcap, float logit_scale, bool joint, "
    "Tensor(a!) ids, Tensor(b!) gprime, Tensor(c!) weights, Tensor(d!) logp, Tensor(e!) n, "
    "Tensor(f!) token, Tensor(g!) token_logp, Tensor(h!) kind, Tensor(i!)? embedded, "
    "Tensor(j!)? lse, Tensor(k!)? entropy, Tensor(l!) valid) -> ()"
)
LIBRARY.define(
    "gumbel_noise(Tensor ids, Tensor seed, Tensor position, Tensor uid, Tensor stream) -> Tensor"
)
LIBRARY.define("soft_embedding(Tensor ids, Tensor weights, Tensor embed) -> Tensor")

BACKENDS = ("auto", "reference", "cpu", "triton")


def backend_of(name: str, device: torch.device, *dtypes: torch.dtype) -> str:
    """The back end that `name` stands for on this device.

    Raises:
        ValueError: an unknown back end, or one that cannot take these tensors.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {name!r}")
    known = all(dtype in cpu.DTYPES for dtype in dtypes)
    compiled = known and device.type == "cpu" and cpu_extension() is not None
    if name == "cpu" and not compiled:
        raise ValueError(
            "backend 'cpu' needs the compiled extension and CPU tensors of float32, bfloat16 or "
            "float16"
        )
    if name == "triton" and not known:
        raise ValueError("backend 'triton' needs tensors of float32, bfloat16 or float16")
    if name != "auto":
        return name
    if known and device.type == "cuda":
        return "triton"
    return "cpu" if compiled else "reference"


def _extension() -> ModuleType:
    kernels = cpu_extension()
    assert kernels is not None  # backend_of has seen it
    return kernels


def soft_token(
    logits: Tensor | None,
    embed: Tensor | None,
    floats: Tensor,
    ints: Tensor,
    terminal_ids: Tensor | None,
    hidden: Tensor | None,
    lm_head: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    joint: bool,
    *outputs: Any,
    backend: str = "auto",
) -> None:
    """`outputs` are the fields of a SoftToken; the rest as in `softgrpo_kernels.soft_token`."""
    out = SoftToken(*outputs)
    rows = RowParameters(floats, ints, out.ids.shape[1])
    if floats.is_cpu:
        rows.check()  # elsewhere the kernels mark rows as not valid
    head = None
    if hidden is not None and lm_head is not None:
        head = LMHead(hidden, lm_head, bias, softcap, logit_scale)
    tables = (x.dtype for x in (logits, embed, lm_head) if x is not None)
    backend = backend_of(backend, floats.device, *tables)
    if logits is None and backend != "triton":  # which has a kernel for the two together
        assert head is not None
        logits = head.logits()
    run: Callable[..., None] = reference.soft_token
    if backend == "cpu":
        run = partial(cpu.soft_token, _extension())
    elif backend == "triton":
        from softgrpo_kernels import gpu

        run = gpu.soft_token
    run(logits, embed, rows, out, terminal_ids=terminal_ids, head=head, joint=joint)


def gumbel_noise(
    ids: Tensor, seed: Tensor, position: Tensor, uid: Tensor, stream: Tensor
) -> Tensor:
    """See `softgrpo_kernels.gumbel_noise`; all keys are int64 tensors."""
    if ids.is_cpu:
        check_counter_words(position, uid, stream)
    backend = backend_of("auto", ids.device)
    if backend == "cpu" and ids.dim() > 0:
        return cpu.gumbel_noise(_extension(), ids, seed, position, uid, stream)
    if backend == "triton" and ids.dim() > 0:
        from softgrpo_kernels import gpu

        return gpu.gumbel_noise(ids, seed, position, uid, stream)
    return reference.gumbel_noise(ids, seed, position, uid, stream)


def soft_embedding(ids: Tensor, weights: Tensor, embed: Tensor) -> Tensor:
    """See `softgrpo_kernels.soft_embedding`."""
    if ids.is_cpu and ids.numel() and ids.max() >= embed.shape[0]:
        raise ValueError(f"ids: {int(ids.max())} is no row of embed, which has {embed.shape[0]}")
    backend = backend_of("auto", embed.device, embed.dtype)
    if backend == "cpu":
        return cpu.soft_embedding(_extension(), ids, weights, embed)
    if backend == "triton":
        from softgrpo_kernels import gpu

        return gpu.soft_embedding(ids, weights, embed)
    return reference.soft_embedding(ids, weights, embed)


def _save_soft_embedding(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_soft_embedding(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dw_j = <d, E[id_j]>; dE[id_j] += w_j d."""
    ids, weights, embed = ctx.saved_tensors
    kernels = torch.ops.softgrpo_kernels
    rows = ids.shape[:-1].numel()
    grad_NH, ids_NK = grad.reshape(rows, embed.shape[1]), ids.reshape(rows, ids.shape[-1])
    d_weights = d_embed = None
    if ctx.needs_input_grad[1]:
        dots_NK = kernels.indexed_dot(grad_NH, embed, ids_NK)
        d_weights = dots_NK.reshape(weights.shape).to(weights.dtype)
    if ctx.needs_input_grad[2]:
        d_embed = kernels.indexed_dot_backward_dense(
            weights.reshape(ids_NK.shape), grad_NH, ids_NK, embed.shape[0], embed.dtype
        )
    return None, d_weights, d_embed


def _fake_soft_token(*args: Any) -> None: ...


def _fake_gumbel_noise(ids: Tensor, *keys: Tensor) -> Tensor:
    return torch.empty(ids.shape, dtype=torch.float32, device=ids.device)


def _fake_soft_embedding(ids: Tensor, weights: Tensor, embed: Tensor) -> Tensor:
    return embed.new_empty((*ids.shape[:-1], embed.shape[1]))


for _op in (soft_token, gumbel_noise, soft_embedding):
    LIBRARY.impl(_op.__name__, _op, "CompositeExplicitAutograd")
for _name, _fake in (
    ("soft_token", _fake_soft_token),
    ("gumbel_noise", _fake_gumbel_noise),
    ("soft_embedding", _fake_soft_embedding),
):
    torch.library.register_fake(f"softgrpo_kernels::{_name}", _fake)
torch.library.register_autograd(
    "softgrpo_kernels::soft_embedding",
    _differentiate_soft_embedding,
    setup_context=_save_soft_embedding,
)
