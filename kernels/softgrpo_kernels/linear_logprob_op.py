"""One op for all rows of a training pass: dot products with candidates, and whole-vocabulary rows.

Soft rows need their candidates' dot products, discrete rows the softmax over all tokens. Both come
from one op, so that the gradient of lm_head is made once, in one buffer.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softgrpo_kernels import linear_logprob_passes
from softgrpo_kernels.backends import LIBRARY, backend_of
from softgrpo_kernels.indexed_dot import (
    differentiable_once,
    indexed_dot,
    indexed_dot_add_to_table,
    indexed_dot_backward_hidden,
    indexed_dot_backward_table,
)
from softgrpo_kernels.linear_logprob_slices import LogitMap, TokenGradients
from softgrpo_kernels.tensors import wide_dtype


class LinearRows(NamedTuple):
    """Arguments of the op.

    hidden [N, H]; lm_head [V, H], same dtype; bias [V] or None; ids int [N, K], < 0 unused, K may
    be 0; label int [N], < 0 where the row needs no softmax over the vocabulary (with K = 0 every
    row needs it), or None if no row does; rows: int64, those with a label, ascending, where the
    caller knows them: to find them on a device waits for it; temperature [N] in the dtype of the
    computation.
    """

    hidden: Tensor
    lm_head: Tensor
    bias: Tensor | None
    ids: Tensor
    label: Tensor | None
    rows: Tensor | None
    temperature: Tensor
    softcap: float | None
    logit_scale: float
    need_entropy: bool

    def full_rows(self) -> Tensor:
        """int64, the rows with a label."""
        if self.label is None:
            return torch.empty(0, dtype=torch.int64, device=self.ids.device)
        if self.ids.shape[1] == 0:  # nothing but labels: a device need not be asked which
            return torch.arange(len(self.label), device=self.ids.device)
        return (self.label >= 0).nonzero()[:, 0] if self.rows is None else self.rows

    def full_arguments(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, LogitMap]:
        """What `token_logprob` takes, of these rows."""
        assert self.label is not None
        wide = self.temperature.dtype
        bias = None if self.bias is None else self.bias.to(wide)
        logit_map = LogitMap(bias, self.temperature[rows, None], self.softcap, self.logit_scale)
        return self.hidden[rows], self.lm_head, self.label[rows], logit_map


def linear_logprob(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op. Arguments: LinearRows.

    Returns:
        dots [N, K]: <hidden_i, lm_head[ids_ij]>, before bias, scale, softcap and temperature; logp,
        lse, entropy [N]: of the label over the vocabulary, after all of them; 0 in rows without
        a label (entropy also where it is not needed). fp32 (fp64 for fp64).
    """
    inputs = LinearRows(*arguments)
    check_ids("ids", inputs.ids, inputs.lm_head)
    dots = indexed_dot(inputs.hidden, inputs.lm_head, inputs.ids)
    logp, lse, entropy = (dots.new_zeros(len(inputs.hidden)) for _ in range(3))
    rows = inputs.full_rows()
    if len(rows):
        assert inputs.label is not None
        check_ids("label", inputs.label, inputs.lm_head)
        full = _passes(inputs.hidden).token_logprob(
            *inputs.full_arguments(rows), need_entropy=inputs.need_entropy
        )
        for out, values in zip((logp, lse, entropy), full, strict=True):
            out.index_copy_(0, rows, values)
    return dots, logp, lse, entropy


def _passes(hidden: Tensor) -> ModuleType:
    """Those over the vocabulary, of the back end of these hidden states."""
    if backend_of("auto", hidden.device, hidden.dtype) != "triton":
        return linear_logprob_passes
    from softgrpo_kernels.gpu import linear_logprob as gpu

    return gpu


def check_ids(name: str, ids: Tensor, lm_head: Tensor) -> None:
    # On a device the comparison would wait for it.
    if ids.is_cpu and ids.numel() and int(ids.max()) >= lm_head.shape[0]:
        raise ValueError(
            f"{name} must be token ids below {lm_head.shape[0]}, got {int(ids.min())} .. "
            f"{int(ids.max())}"
        )


def differentiate(
    inputs: LinearRows,
    lse: Tensor,
    entropy: Tensor,
    grads: tuple[Tensor | None, ...],
    d_weight: Tensor | None,
    *,
    need_hidden: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(d hidden, d bias); adds the gradient of lm_head into d_weight [V, H].

    grads: of the four results of `linear_logprob`. Every sum has a fixed order: rows over the
    whole vocabulary first, then candidates by id and row.
    """
    d_dots, d_logp, d_lse, d_entropy = grads
    d_hidden = d_bias = None
    if need_hidden:
        d_hidden = inputs.hidden.new_zeros(inputs.hidden.shape)
        if d_dots is not None:
            d_hidden = indexed_dot_backward_hidden(
                d_dots, inputs.lm_head, inputs.ids, inputs.hidden.dtype
            )
    if need_bias and inputs.bias is not None:
        d_bias = inputs.bias.new_zeros(inputs.bias.shape)
    rows = inputs.full_rows()
    if len(rows):

        def of_rows(grad: Tensor | None) -> Tensor:
            return torch.zeros_like(lse[rows]) if grad is None else grad[rows]

        full = _passes(inputs.hidden).token_logprob_backward(
            TokenGradients(
                of_rows(d_logp), of_rows(d_lse), of_rows(d_entropy) if inputs.need_entropy else None
            ),
            *inputs.full_arguments(rows),
            lse[rows],
            entropy[rows],
            need_hidden=need_hidden,
            d_weight=d_weight,
            d_bias=d_bias,
        )
        if d_hidden is not None and full is not None:
            # A row is soft or discrete: one of the two is zero unless it has an entropy.
            d_hidden[rows] = (d_hidden[rows].to(full.dtype) + full).to(d_hidden.dtype)
    if d_weight is not None and d_dots is not None:
        indexed_dot_add_to_table(d_weight, d_dots, inputs.hidden, inputs.ids)
    return d_hidden, d_bias


def linear_logprob_backward(
    d_dots: Tensor | None,
    d_logp: Tensor | None,
    d_lse: Tensor | None,
    d_entropy: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    needs: list[bool],
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense gradients of hidden, lm_head and bias; an empty tensor where not needed."""
    inputs = LinearRows(*arguments)
    d_weight = inputs.lm_head.new_zeros(inputs.lm_head.shape) if needs[1] else None
    grads = (d_dots, d_logp, d_lse, d_entropy)
    d_hidden, d_bias = differentiate(
        inputs, lse, entropy, grads, d_weight, need_hidden=needs[0], need_bias=needs[2]
    )
    first, second, third = (
        inputs.hidden.new_empty(0) if x is None else x for x in (d_hidden, d_weight, d_bias)
    )
    return first, second, third


class SpecialWeightGradient(torch.autograd.Function):
    """The op with another gradient of lm_head: "rows" (sparse), "accumulate" (into its .grad), or
    into the .grad of a master copy."""

    @staticmethod
    def forward(ctx: Any, grad_weight: str | Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        inputs = LinearRows(*arguments)
        results = linear_logprob(*arguments)
        ctx.sparse = isinstance(grad_weight, str) and grad_weight == "rows"
        # The parameter itself, whose .grad receives the sum: a saved tensor may be another object.
        ctx.parameter = grad_weight if isinstance(grad_weight, Tensor) else inputs.lm_head
        _save(ctx, arguments, results)
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, lse, entropy = _saved(ctx)
        need_master, need_hidden, need_weight, need_bias = ctx.needs_input_grad[:4]
        target = None
        if (need_master or need_weight) and not ctx.sparse:
            if ctx.parameter.grad is None:
                ctx.parameter.grad = torch.zeros_like(ctx.parameter, dtype=ctx.parameter.grad_dtype)
            target = ctx.parameter.grad
        d_hidden, d_bias = differentiate(
            inputs, lse, entropy, grads, target, need_hidden=need_hidden, need_bias=need_bias
        )
        d_weight = None
        if need_weight and ctx.sparse and grads[0] is not None:
            rows, values = indexed_dot_backward_table(grads[0], inputs.hidden, inputs.ids)
            d_weight = _sparse_rows(rows, values.to(inputs.lm_head.dtype), inputs.lm_head)
        return None, d_hidden, d_weight, d_bias, *([None] * 7)


def _sparse_rows(rows: Tensor, values: Tensor, like: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(
        rows[None], values, like.shape, is_coalesced=True, check_invariants=False
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows = LinearRows(*inputs)
    _, _, lse, entropy = output
    ctx.save_for_backward(*rows[:7], lse, entropy)
    ctx.constants = rows[7:]
    ctx.set_materialize_grads(False)


def _saved(ctx: Any) -> tuple[LinearRows, Tensor, Tensor]:
    *tensors, lse, entropy = ctx.saved_tensors
    return LinearRows(*tensors, *ctx.constants), lse, entropy


def _differentiate_op(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs, lse, entropy = _saved(ctx)
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    gradients = torch.ops.softgrpo_kernels.linear_logprob_backward(
        *grads, lse, entropy, needs, *inputs
    )
    kept = (x if need else None for x, need in zip(gradients, needs, strict=True))
    return *kept, *([None] * 7)


_ARGUMENTS = (
    "Tensor hidden, Tensor lm_head, Tensor? bias, Tensor ids, Tensor? label, Tensor? rows, "
    "Tensor temperature, float? softcap, float logit_scale, bool need_entropy"
)
LIBRARY.define(f"linear_logprob({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define(
    "linear_logprob_backward(Tensor? d_dots, Tensor? d_logp, Tensor? d_lse, Tensor? d_entropy, "
    f"Tensor lse, Tensor entropy, bool[] needs, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.impl("linear_logprob", linear_logprob, "CompositeExplicitAutograd")
LIBRARY.impl("linear_logprob_backward", linear_logprob_backward, "CompositeExplicitAutograd")


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, ids = arguments[0], arguments[3]
    wide = wide_dtype(hidden.dtype)
    per_row = (hidden.new_empty(hidden.shape[0], dtype=wide) for _ in range(3))
    return hidden.new_empty(ids.shape, dtype=wide), *per_row


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    needs, (hidden, lm_head, bias) = arguments[6], arguments[7:10]
    return tuple(
        x.new_empty(x.shape) if need and x is not None else hidden.new_empty(0)
        for x, need in zip((hidden, lm_head, bias), needs, strict=True)
    )


torch.library.register_fake("softgrpo_kernels::linear_logprob", _fake)
torch.library.register_fake("softgrpo_kernels::linear_logprob_backward", _fake_backward)
torch.library.register_autograd(
    "softgrpo_kernels::linear_logprob", _differentiate_op, setup_context=_save
)
torch.library.register_autograd("softgrpo_kernels::linear_logprob_backward", differentiable_once)
