"""Log-probabilities of recorded tokens from hidden states and LM-head weights.

Nothing of the size of the vocabulary is kept per row for the backward pass. All arithmetic is fp32
(fp64 for fp64 tensors) whatever the dtype of hidden and lm_head.

What the functions share:
    Logits are those of the model, a = softcap tanh(logit_scale (x . W + bias) / softcap) / T, each
    part left out by default. bias: [V] or None, differentiable. softcap: > 0 or None (Gemma's
    final_logit_softcapping). logit_scale: number (Cohere). temperature: number or [N], > 0.
    grad_weight: what backward does for lm_head. "dense": an ordinary gradient. "rows": a coalesced
    sparse gradient with the rows in use only; every row must be soft. "accumulate": adds straight
    into lm_head.grad, without a temporary of its size, and autograd sees no gradient: hooks do not
    run; lm_head must be a leaf. A leaf [V, H]: the same into the .grad of that tensor, of which
    lm_head is a copy in another dtype (master weights). Both .grad have the leaf's grad_dtype. The
    last three are for eager mode.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from softgrpo_kernels.checks import check_divisor, check_head_map
from softgrpo_kernels.limits import LARGEST, SMALLEST
from softgrpo_kernels.linear_logprob_op import SpecialWeightGradient, check_ids
from softgrpo_kernels.lm_head import scaled_and_capped
from softgrpo_kernels.methods import method_of
from softgrpo_kernels.soft_density import soft_density
from softgrpo_kernels.tensors import on_device, wide_dtype

GradWeight = Literal["dense", "rows", "accumulate"] | Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def linear_candidate_logprob(
    hidden: Tensor,
    lm_head: Tensor,
    ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    grad_weight: GradWeight = "dense",
) -> Tensor:
    """Log-softmax over each row's candidates: log q_i = a_i - LSE_j(a_j), a the logit / T.

    The softmax over the vocabulary, renormalised over the candidates, is the same number: K dot
    products replace V.

    Args:
        hidden: [N, H]; lm_head: [V, H] in the same dtype.
        ids: int [N, K], candidate token ids; unused slots < 0.
        temperature, bias, softcap, logit_scale, grad_weight: see the module.

    Returns:
        [N, K] float32 (float64 for float64), -inf in unused slots. Differentiable in hidden, bias
        and lm_head (rows that are nobody's candidate get exactly 0).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an id outside the vocabulary.
    """
    head = _Head(hidden, lm_head, temperature, bias, softcap, logit_scale, grad_weight)
    _check_integers("ids", ids, (hidden.shape[0], None), hidden)
    dots, *_ = head.run(ids, None, need_entropy=False)
    return head.candidate_logprob(dots, ids)


@overload
def linear_token_logprob(
    hidden: Tensor,
    lm_head: Tensor,
    label: Tensor,
    *,
    temperature: float | Tensor = ...,
    bias: Tensor | None = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    need_entropy: Literal[False] = ...,
    grad_weight: GradWeight = ...,
) -> Tensor: ...
@overload
def linear_token_logprob(
    hidden: Tensor,
    lm_head: Tensor,
    label: Tensor,
    *,
    temperature: float | Tensor = ...,
    bias: Tensor | None = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    need_entropy: Literal[True],
    grad_weight: GradWeight = ...,
) -> tuple[Tensor, Tensor]: ...
def linear_token_logprob(
    hidden: Tensor,
    lm_head: Tensor,
    label: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    need_entropy: bool = False,
    grad_weight: GradWeight = "dense",
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(a)[label] over the whole vocabulary, in slices of it.

    Args:
        hidden: [N, H]; lm_head: [V, H] in the same dtype.
        label: int [N], token ids.
        temperature, bias, softcap, logit_scale, grad_weight: see the module; not "rows".

    Returns:
        [N] float32 (float64 for float64); with need_entropy also the entropy [N] in nats. Both
        differentiable in hidden, lm_head and bias; backward computes the logits again.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a label outside the vocabulary.
    """
    head = _Head(hidden, lm_head, temperature, bias, softcap, logit_scale, grad_weight)
    _check_integers("label", label, (hidden.shape[0],), hidden)
    if isinstance(grad_weight, str) and grad_weight == "rows":
        raise ValueError('grad_weight="rows" needs soft rows; here every row of lm_head is used')
    _check_labels(label, lm_head)
    ids = label.new_empty((label.shape[0], 0))
    _, logp, _, entropy = head.run(ids, label, need_entropy=need_entropy)
    return (logp, entropy) if need_entropy else logp


@overload
def linear_soft_logprob(
    hidden: Tensor,
    lm_head: Tensor,
    ids: Tensor,
    gprime: Tensor,
    n: Tensor,
    row_kind: Tensor,
    label: Tensor,
    *,
    temperature: float | Tensor = ...,
    objective: str = ...,
    noise_scale: float = ...,
    tau: float = ...,
    weight_floor: float = ...,
    bias: Tensor | None = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    need_entropy: Literal[False] = ...,
    grad_weight: GradWeight = ...,
) -> Tensor: ...
@overload
def linear_soft_logprob(
    hidden: Tensor,
    lm_head: Tensor,
    ids: Tensor,
    gprime: Tensor,
    n: Tensor,
    row_kind: Tensor,
    label: Tensor,
    *,
    temperature: float | Tensor = ...,
    objective: str = ...,
    noise_scale: float = ...,
    tau: float = ...,
    weight_floor: float = ...,
    bias: Tensor | None = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    need_entropy: Literal[True],
    grad_weight: GradWeight = ...,
) -> tuple[Tensor, Tensor]: ...
def linear_soft_logprob(
    hidden: Tensor,
    lm_head: Tensor,
    ids: Tensor,
    gprime: Tensor,
    n: Tensor,
    row_kind: Tensor,
    label: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    objective: str = "exact",
    noise_scale: float = 1.0,
    tau: float = 0.1,
    weight_floor: float = 0.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    need_entropy: bool = False,
    grad_weight: GradWeight = "dense",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-density of every position: soft rows over their candidates, others over all tokens.

    Args:
        hidden: [N, H]; lm_head: [V, H] in the same dtype.
        ids, gprime: [N, K], the record of soft rows; slots from n on are unused.
        n: int [N], slots in use, at most K.
        row_kind: uint8 [N], 1 soft, 0 discrete. On the host, whatever the device of the others,
            nothing waits: which rows are discrete need not be asked of the device.
        label: int [N], token ids, read in discrete rows.
        objective, noise_scale, tau, weight_floor: see `soft_density`; read in soft rows.
        need_entropy: the whole vocabulary's entropy of every row, soft ones too; it makes all rows
            as expensive as discrete ones.
        temperature, bias, softcap, logit_scale, grad_weight: see the module.

    Returns:
        [N] float32 (float64 for float64); with need_entropy also the entropy [N] in nats. Both
        differentiable in hidden, lm_head and bias.

    Raises:
        ValueError: see `linear_candidate_logprob`, `linear_token_logprob`, `soft_density`; on the
            CPU also another row_kind, an n beyond K.
    """
    head = _Head(hidden, lm_head, temperature, bias, softcap, logit_scale, grad_weight)
    if method_of("gumbel", objective).normalised_over == "vocabulary":
        raise ValueError(
            f"objective {objective!r} needs log q over the vocabulary, not over candidates; use "
            "linear_candidate_logprob, linear_token_logprob and soft_density"
        )
    _check_integers("ids", ids, (hidden.shape[0], None), hidden)
    if gprime.shape != ids.shape or not gprime.is_floating_point():
        raise ValueError(
            f"gprime must be floating point {list(ids.shape)} like ids, not {gprime.dtype} "
            f"{list(gprime.shape)}"
        )
    for name, value in (("n", n), ("label", label)):
        _check_integers(name, value, (hidden.shape[0],), hidden)
    here = hidden if row_kind.device == hidden.device else hidden.new_empty(0, device="cpu")
    _check_integers("row_kind", row_kind, (hidden.shape[0],), here)
    _check_record(n, row_kind, ids.shape[1])
    soft, ids, label = row_kind == 1, ids.long(), label.long()
    by_rows = isinstance(grad_weight, str) and grad_weight == "rows"
    if by_rows and (need_entropy or not bool(soft.all())):
        raise ValueError(
            'grad_weight="rows" needs every row to be soft (row_kind 1) and no entropy; use "dense"'
        )
    rows = None
    if need_entropy:
        rows = torch.arange(len(soft), device=hidden.device)
    elif not torch.compiler.is_compiling():  # which could not; then the op finds them
        rows = on_device((~soft).nonzero()[:, 0], hidden.device)
    soft = on_device(soft, hidden.device)
    _check_labels(torch.where(soft, 0, label), lm_head)
    live = (torch.arange(ids.shape[1], device=ids.device) < n[:, None]) & soft[:, None]
    ids = ids.masked_fill(~live, -1)
    gprime = gprime.masked_fill(~live, -torch.inf)
    dots, token_logp, _, entropy = head.run(
        ids, torch.where(soft, 0 if need_entropy else -1, label), rows, need_entropy=need_entropy
    )
    density = soft_density(
        head.candidate_logprob(dots, ids),
        gprime,
        objective=objective,
        noise_scale=noise_scale,
        tau=tau,
        weight_floor=weight_floor,
    )
    logp = torch.where(soft, density, token_logp)
    return (logp, entropy) if need_entropy else logp


class _Head:
    """The checked arguments that make logits of hidden states."""

    def __init__(
        self,
        hidden: Tensor,
        lm_head: Tensor,
        temperature: float | Tensor,
        bias: Tensor | None,
        softcap: float | None,
        logit_scale: float,
        grad_weight: GradWeight,
    ) -> None:
        _check(hidden, lm_head, bias)
        check_head_map(softcap, logit_scale)
        if isinstance(grad_weight, Tensor):
            if grad_weight.shape != lm_head.shape or not grad_weight.is_leaf:
                raise ValueError(
                    f"grad_weight must be a leaf {list(lm_head.shape)} like lm_head, got "
                    f"{list(grad_weight.shape)}"
                )
        elif grad_weight not in ("dense", "rows", "accumulate"):
            raise ValueError(f"grad_weight must be dense, rows or accumulate, not {grad_weight!r}")
        elif grad_weight == "accumulate" and not lm_head.is_leaf:
            raise ValueError(
                'grad_weight="accumulate" needs lm_head to be a leaf, it has a grad_fn'
            )
        self.hidden, self.lm_head, self.bias = hidden, lm_head, bias
        self.temperature_N = _temperature(temperature, hidden)
        self.softcap, self.logit_scale, self.grad_weight = softcap, logit_scale, grad_weight

    def run(
        self, ids: Tensor, label: Tensor | None, rows: Tensor | None = None, *, need_entropy: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `linear_logprob_op.linear_logprob`."""
        arguments = (
            self.hidden, self.lm_head, self.bias, ids, label, rows, self.temperature_N,
            self.softcap, self.logit_scale, need_entropy,
        )  # fmt: skip
        if isinstance(self.grad_weight, str) and self.grad_weight == "dense":
            return torch.ops.softgrpo_kernels.linear_logprob(*arguments)
        return SpecialWeightGradient.apply(self.grad_weight, *arguments)

    def candidate_logprob(self, dots_NK: Tensor, ids: Tensor) -> Tensor:
        """log q [N, K] of the dot products, -inf in unused slots."""
        logits = dots_NK
        if self.bias is not None:
            # Its backward adds in the order of the index, that of bias[ids] does not.
            tokens = ids.long().clamp(min=0).flatten()
            logits = logits + self.bias.to(logits.dtype).index_select(0, tokens).view(ids.shape)
        logits = scaled_and_capped(logits, self.logit_scale, self.softcap)
        live = ids >= 0
        scaled = (logits / self.temperature_N[:, None]).masked_fill(~live, -torch.inf)
        # Rows without candidates have no softmax.
        scaled = scaled.masked_fill(~live.any(-1, keepdim=True), 0.0)
        return scaled.log_softmax(-1).masked_fill(~live, -torch.inf)


def _temperature(temperature: float | Tensor, hidden: Tensor) -> Tensor:
    """[N] in the dtype of the computation."""
    if not isinstance(temperature, Tensor):
        check_divisor("temperature", temperature)
        # (A number that is copied to a device is waited for.)
        value = torch.full((), temperature, dtype=wide_dtype(hidden.dtype), device=hidden.device)
    else:
        value = temperature.to(hidden.device, wide_dtype(hidden.dtype))
    if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != hidden.shape[0]):
        raise ValueError(
            f"temperature must be a number or [{hidden.shape[0]}], not {list(value.shape)}"
        )
    looks = isinstance(temperature, Tensor) and _may_look_at(value)
    if looks and not bool(((value >= SMALLEST) & (value <= LARGEST)).all()):
        raise ValueError("temperature must be > 0, not denormal and finite")
    return value.detach().expand(hidden.shape[0])


def _check(hidden: Tensor, lm_head: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() != 2 or lm_head.dim() != 2 or hidden.shape[1] != lm_head.shape[1]:
        raise ValueError(
            f"need hidden [N, H] and lm_head [V, H], got {list(hidden.shape)} and "
            f"{list(lm_head.shape)}"
        )
    if hidden.dtype != lm_head.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, lm_head {lm_head.dtype}: cast one of them")
    if hidden.dtype not in _DTYPES:
        raise ValueError(f"hidden and lm_head must be floating point, not {hidden.dtype}")
    if hidden.device != lm_head.device:
        raise ValueError(f"hidden is on {hidden.device}, lm_head on {lm_head.device}")
    if bias is not None and (bias.shape != lm_head.shape[:1] or not bias.is_floating_point()):
        raise ValueError(
            f"bias must be floating point [{lm_head.shape[0]}], not {bias.dtype} {list(bias.shape)}"
        )
    if bias is not None and bias.device != lm_head.device:
        raise ValueError(f"bias is on {bias.device}, lm_head on {lm_head.device}")


def _check_integers(
    name: str, value: Tensor, shape: tuple[int | None, ...], hidden: Tensor
) -> None:
    wanted = [
        have if want is None else want for have, want in zip(value.shape, shape, strict=False)
    ]
    if value.dim() != len(shape) or list(value.shape) != wanted:
        text = ", ".join("K" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must be [{text}], not {list(value.shape)}")
    if value.dtype not in _INTEGERS:
        raise ValueError(f"{name} must be integers, not {value.dtype}")
    if value.device != hidden.device:
        raise ValueError(f"{name} is on {value.device}, hidden on {hidden.device}")


def _check_record(n: Tensor, row_kind: Tensor, slots: int) -> None:
    if not n.numel() or not (_may_look_at(n) and _may_look_at(row_kind)):
        return
    if int(n.min()) < 0 or int(n.max()) > slots:
        raise ValueError(f"n must be 0 .. K = {slots}, not {int(n.min())} .. {int(n.max())}")
    low, high = int(row_kind.min()), int(row_kind.max())
    if low < 0 or high > 1:
        raise ValueError(
            f"row_kind must be 0 (discrete) or 1 (soft), not {high if high > 1 else low}"
        )


def _check_labels(label: Tensor, lm_head: Tensor) -> None:
    if not _may_look_at(label) or not label.numel():
        return
    if int(label.min()) < 0:
        raise ValueError(f"label must be token ids, not {int(label.min())}")
    check_ids("label", label, lm_head)


def _may_look_at(value: Tensor) -> bool:
    """Whether a check of values costs nothing: not on a device, not while tracing."""
    return value.is_cpu and not torch.compiler.is_compiling()
