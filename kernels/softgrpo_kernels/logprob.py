"""Log-probabilities of recorded tokens from hidden states and LM-head weights.

Nothing of the size of the vocabulary is kept per row for the backward pass. All arithmetic is fp32
(fp64 for fp64 tensors) whatever the dtype of hidden and lm_head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from softgrpo_kernels.reference.soft_density import soft_density

# Elements of the largest temporary (fp32: 64 MiB).
_CHUNK_ELEMENTS = 1 << 24


def linear_candidate_logprob(
    hidden: Tensor, lm_head: Tensor, ids: Tensor, *, temperature: float | Tensor = 1.0
) -> Tensor:
    """Log-softmax over each row's candidates: log q_i = a_i - LSE_j(a_j), a = x . W[id] / T.

    The softmax over the vocabulary, renormalised over the candidates, is the same number: K dot
    products replace V.

    Args:
        hidden: [N, H]; lm_head: [V, H] in the same dtype.
        ids: [N, K], candidate token ids; unused slots < 0.
        temperature: number or [N].

    Returns:
        [N, K] float32 (float64 for float64), -inf in unused slots. Differentiable in hidden and
        lm_head (rows that are nobody's candidate get exactly 0).

    Raises:
        ValueError: shapes or dtypes that do not fit, an id outside the vocabulary.
    """
    _check(hidden, lm_head)
    if ids.dim() != 2 or ids.shape[0] != hidden.shape[0]:
        raise ValueError(f"ids must be [{hidden.shape[0]}, K], not {list(ids.shape)}")
    _check_ids(ids, lm_head, "ids")
    temperature_N1 = _temperature(temperature, hidden)
    return _CandidateLogprob.apply(hidden, lm_head, ids.long(), temperature_N1)


@overload
def linear_token_logprob(
    hidden: Tensor,
    lm_head: Tensor,
    label: Tensor,
    *,
    temperature: float | Tensor = ...,
    need_entropy: Literal[False] = ...,
) -> Tensor: ...
@overload
def linear_token_logprob(
    hidden: Tensor,
    lm_head: Tensor,
    label: Tensor,
    *,
    temperature: float | Tensor = ...,
    need_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def linear_token_logprob(
    hidden: Tensor,
    lm_head: Tensor,
    label: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    need_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(x W^T / T)[label] over the whole vocabulary, in slices of it.

    Args:
        hidden: [N, H]; lm_head: [V, H] in the same dtype.
        label: int [N], token ids.
        temperature: number or [N].

    Returns:
        [N] float32 (float64 for float64); with need_entropy also the entropy [N] in nats. Both
        differentiable in hidden and lm_head; backward computes the logits again.

    Raises:
        ValueError: shapes or dtypes that do not fit, a label outside the vocabulary.
    """
    _check(hidden, lm_head)
    if label.shape != hidden.shape[:1]:
        raise ValueError(f"label must be [{hidden.shape[0]}], not {list(label.shape)}")
    _check_ids(label, lm_head, "label", lowest=0)
    temperature_N1 = _temperature(temperature, hidden)
    logp, entropy = _TokenLogprob.apply(hidden, lm_head, label.long(), temperature_N1, need_entropy)
    return (logp, entropy) if need_entropy else logp


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
) -> Tensor:
    """Log-density of every position: soft rows over their candidates, others over all tokens.

    Args:
        hidden: [N, H]; lm_head: [V, H] in the same dtype.
        ids, gprime: [N, K], the record of soft rows; slots from n on are unused.
        n: int [N], slots in use.
        row_kind: uint8 [N], 1 soft, 0 discrete.
        label: int [N], token ids, read in discrete rows.
        temperature: number or [N].
        objective, noise_scale: see `soft_density`; read in soft rows.

    Returns:
        [N] float32 (float64 for float64), differentiable in hidden and lm_head.

    Raises:
        ValueError: see `linear_candidate_logprob`, `linear_token_logprob`, `soft_density`.
    """
    if gprime.shape != ids.shape or not (n.shape == row_kind.shape == label.shape == ids.shape[:1]):
        raise ValueError(
            f"need ids and gprime [N, K], n, row_kind and label [N]; got {list(ids.shape)}, "
            f"{list(gprime.shape)}, {list(n.shape)}, {list(row_kind.shape)}, {list(label.shape)}"
        )
    temperature_N = _temperature(temperature, hidden)[:, 0]
    soft, hard = ((row_kind == kind).nonzero()[:, 0] for kind in (1, 0))
    live = torch.arange(ids.shape[1], device=ids.device) < n[soft, None]
    logq = linear_candidate_logprob(
        hidden[soft], lm_head, ids[soft].masked_fill(~live, -1), temperature=temperature_N[soft]
    )
    recorded = gprime[soft].masked_fill(~live, -torch.inf)
    density = soft_density(logq, recorded, objective=objective, noise_scale=noise_scale)
    token = linear_token_logprob(
        hidden[hard], lm_head, label[hard], temperature=temperature_N[hard]
    )
    result = density.new_zeros(hidden.shape[0])
    return result.index_put((soft,), density).index_put((hard,), token)


class _CandidateLogprob(torch.autograd.Function):
    """dz_j = (g_j - q_j sum_i g_i) / T; dX = sum_j dz_j W[id_j]; dW[id_j] += dz_j x."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, lm_head: Tensor, ids: Tensor, temperature: Tensor
    ) -> Tensor:
        wide = temperature.dtype
        logits = torch.empty(ids.shape, dtype=wide, device=ids.device)
        for rows in _row_chunks(ids.shape[0], ids.shape[1] * hidden.shape[1]):
            weight_NKH = lm_head[ids[rows].clamp(min=0)].to(wide)
            logits[rows] = torch.bmm(weight_NKH, hidden[rows].to(wide)[..., None])[..., 0]
        live = ids >= 0
        # Rows without candidates have no softmax.
        scaled = (logits / temperature).masked_fill(~live, -torch.inf)
        scaled = scaled.masked_fill(~live.any(-1, keepdim=True), 0.0)
        logq = scaled.log_softmax(-1).masked_fill(~live, -torch.inf)
        ctx.save_for_backward(hidden, lm_head, ids, temperature, logq)
        return logq

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, lm_head, ids, temperature, logq = ctx.saved_tensors  # type: ignore[attr-defined]
        wide = temperature.dtype
        grad = torch.where(ids >= 0, grad.to(wide), 0.0)
        dz_NK = (grad - logq.exp() * grad.sum(-1, keepdim=True)) / temperature
        need_hidden, need_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(lm_head, dtype=wide) if need_weight else None
        for rows in _row_chunks(ids.shape[0], ids.shape[1] * hidden.shape[1]):
            tokens = ids[rows].clamp(min=0)
            if d_hidden is not None:
                weight_NKH = lm_head[tokens].to(wide)
                d_hidden[rows] = torch.bmm(dz_NK[rows, None], weight_NKH)[:, 0].to(hidden.dtype)
            if d_weight is not None:
                terms_NKH = dz_NK[rows, :, None] * hidden[rows, None].to(wide)
                live = ids[rows] >= 0
                _add_rows(d_weight, tokens[live], terms_NKH[live])
        return d_hidden, None if d_weight is None else d_weight.to(lm_head.dtype), None, None


class _TokenLogprob(torch.autograd.Function):
    """Forward keeps log-sum-exp and entropy [N] only.

    d logp / d a_j = 1[j = label] - p_j; d entropy / d a_j = -p_j (log p_j + entropy).
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        lm_head: Tensor,
        label: Tensor,
        temperature: Tensor,
        need_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = temperature.dtype
        x_NH = hidden.to(wide) / temperature
        top = torch.full_like(temperature, -torch.inf)
        mass, weighted = torch.zeros_like(top), torch.zeros_like(top)
        chosen = torch.zeros_like(top)
        for begin, weight_CH in _vocabulary_slices(lm_head, len(label), wide):
            a_NC = x_NH @ weight_CH.mT
            new_top = torch.maximum(top, a_NC.amax(-1, keepdim=True))
            # Moving the reference point: exp(a - top) a stays exact in a, only the factor changes.
            rescale = torch.exp(top - new_top)
            ratio_NC = torch.exp_(a_NC - new_top)
            mass = mass * rescale + ratio_NC.sum(-1, keepdim=True)
            if need_entropy:
                weighted = weighted * rescale + (ratio_NC * a_NC).sum(-1, keepdim=True)
            top = new_top
            slot = label[:, None] - begin
            inside = (slot >= 0) & (slot < weight_CH.shape[0])
            picked = a_NC.gather(1, slot.clamp(0, weight_CH.shape[0] - 1))
            chosen = torch.where(inside, picked, chosen)
        lse = top + mass.log()
        entropy = lse - weighted / mass
        ctx.need_entropy = need_entropy  # type: ignore[attr-defined]
        ctx.save_for_backward(hidden, lm_head, label, temperature, lse, entropy)
        return (chosen - lse)[:, 0], entropy[:, 0]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad_logp: Tensor, grad_entropy: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, lm_head, label, temperature, lse, entropy = ctx.saved_tensors  # type: ignore[attr-defined]
        need_hidden, need_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        wide = temperature.dtype
        x_NH = hidden.to(wide) / temperature
        grad_logp, grad_entropy = grad_logp.to(wide)[:, None], grad_entropy.to(wide)[:, None]
        d_hidden = torch.zeros_like(x_NH) if need_hidden else None
        d_weight = torch.empty_like(lm_head) if need_weight else None
        for begin, weight_CH in _vocabulary_slices(lm_head, len(label), wide):
            width = weight_CH.shape[0]
            logp_NC = (x_NH @ weight_CH.mT).sub_(lse)
            slope: Tensor = -grad_logp
            if ctx.need_entropy:  # type: ignore[attr-defined]
                slope = slope - grad_entropy * (logp_NC + entropy)
            da_NC = logp_NC.exp_().mul_(slope)
            slot = label[:, None] - begin
            inside = (slot >= 0) & (slot < width)
            da_NC.scatter_add_(1, slot.clamp(0, width - 1), torch.where(inside, grad_logp, 0.0))
            if d_hidden is not None:
                d_hidden += da_NC @ weight_CH
            if d_weight is not None:
                d_weight[begin : begin + width] = (da_NC.mT @ x_NH).to(lm_head.dtype)
        if d_hidden is not None:
            d_hidden = (d_hidden / temperature).to(hidden.dtype)
        return d_hidden, d_weight, None, None, None


def _row_chunks(rows: int, elements_per_row: int) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // max(1, elements_per_row))
    return (slice(begin, begin + step) for begin in range(0, rows, step))


def _vocabulary_slices(
    lm_head: Tensor, rows: int, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """(first token, weights [C, H]) over the vocabulary; each slice is converted once."""
    step = max(256, _CHUNK_ELEMENTS // max(1, rows, lm_head.shape[1]))
    for begin in range(0, lm_head.shape[0], step):
        yield begin, lm_head[begin : begin + step].to(dtype)


def _add_rows(table: Tensor, index: Tensor, rows: Tensor) -> None:
    """table[index] += rows in the order of the index."""
    if table.is_cpu:
        table.index_add_(0, index, rows)
    else:
        # Sorts the index first; index_add_ would add by atomics, in any order.
        table.index_put_((index,), rows, accumulate=True)


def _temperature(temperature: float | Tensor, hidden: Tensor) -> Tensor:
    """[N, 1] in the dtype of the computation."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    value = torch.as_tensor(temperature, dtype=wide, device=hidden.device)
    if value.is_cpu and value.numel() and not bool((value > 0).all()):
        raise ValueError("temperature must be > 0")
    return value.expand(hidden.shape[0])[:, None]


def _check(hidden: Tensor, lm_head: Tensor) -> None:
    if hidden.dim() != 2 or lm_head.dim() != 2 or hidden.shape[1] != lm_head.shape[1]:
        raise ValueError(
            f"need hidden [N, H] and lm_head [V, H], got {list(hidden.shape)} and "
            f"{list(lm_head.shape)}"
        )
    if hidden.dtype != lm_head.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, lm_head {lm_head.dtype}: cast one of them")


def _check_ids(ids: Tensor, lm_head: Tensor, name: str, lowest: int | None = None) -> None:
    # On a device the comparison would wait for it; indexing reports it there.
    if not ids.is_cpu or not ids.numel():
        return
    if ids.max() >= lm_head.shape[0] or (lowest is not None and ids.min() < lowest):
        raise ValueError(
            f"{name} must be token ids below {lm_head.shape[0]}, got {int(ids.min())} .. "
            f"{int(ids.max())}"
        )
