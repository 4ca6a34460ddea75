"""Mixtures of embeddings: the inputs that a soft token stands for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softgrpo_kernels.backends import LIBRARY, backend_of
from softgrpo_kernels.checks import check_device, check_integers
from softgrpo_kernels.cpu import soft_embedding as cpu
from softgrpo_kernels.reference import soft_embedding as reference


def soft_embedding(ids: Tensor, weights: Tensor, embed: Tensor) -> Tensor:
    """Mixture of embeddings: sum_j weights[..., j] * embed[ids[..., j]].

    Args:
        ids: int [..., K]; weights: [..., K] float32. Slots with id < 0 or weight 0 are skipped.
        embed: [V, H].

    Returns:
        [..., H] in embed's dtype: fp32 products and sums in slot order, one rounding.
        Differentiable in weights and embed.

    Raises:
        ValueError: shapes that do not fit, an id outside the table.
    """
    if ids.shape != weights.shape or ids.dim() == 0 or embed.dim() != 2:
        raise ValueError(
            f"need ids and weights of one shape [..., K] and embed [V, H], got {list(ids.shape)}, "
            f"{list(weights.shape)}, {list(embed.shape)}"
        )
    check_integers("ids", ids)
    for name, tensor in (("weights", weights), ("embed", embed)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {tensor.dtype}")
        check_device(name, tensor, ids.device)
    return torch.ops.softgrpo_kernels.soft_embedding(ids, weights, embed)


def _op(ids: Tensor, weights: Tensor, embed: Tensor) -> Tensor:
    if ids.is_cpu and ids.numel() and ids.max() >= embed.shape[0]:
        raise ValueError(f"ids: {int(ids.max())} is no row of embed, which has {embed.shape[0]}")
    backend = backend_of("auto", embed.device, embed.dtype)
    if backend == "cpu":
        return cpu.soft_embedding(ids, weights, embed)
    if backend == "triton":
        from softgrpo_kernels.gpu import soft_embedding as gpu

        return gpu.soft_embedding(ids, weights, embed)
    return reference.soft_embedding(ids, weights, embed)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
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


def _fake(ids: Tensor, weights: Tensor, embed: Tensor) -> Tensor:
    return embed.new_empty((*ids.shape[:-1], embed.shape[1]))


LIBRARY.define("soft_embedding(Tensor ids, Tensor weights, Tensor embed) -> Tensor")
LIBRARY.impl("soft_embedding", _op, "CompositeExplicitAutograd")
torch.library.register_fake("softgrpo_kernels::soft_embedding", _fake)
torch.library.register_autograd(
    "softgrpo_kernels::soft_embedding", _differentiate, setup_context=_save
)
