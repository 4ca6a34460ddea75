"""The soft step of a decode: logits in, soft token and its embedding out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from softgrpo_kernels import ops
from softgrpo_kernels.checks import check_device, check_head_map, check_integers, check_word
from softgrpo_kernels.row_rules import LAST_WORD
from softgrpo_kernels.rows import ORDERS, Clamp, Number, RowParameters
from softgrpo_kernels.step import OUTPUTS, SoftToken

# Token ids are int32 in every back end, and blocks reach beyond the last of them.
MAX_VOCABULARY = 2**30


@torch.no_grad()
def soft_token(
    logits: Tensor | None,
    embed: Tensor | None = None,
    *,
    temperature: Number = 1.0,
    top_k: int | Tensor = -1,
    top_p: Number = 1.0,
    min_p: Number = 0.0,
    gumbel_tau: Number = 0.1,
    noise: str | Tensor = "gumbel",
    noise_scale: Number = 1.0,
    noise_clamp: Clamp = None,
    eps: Number = 0.0,
    seed: int | Tensor = 0,
    position: int | Tensor = 0,
    uid: int | Tensor = 0,
    stream: int | Tensor = 0,
    mode: int | Tensor = 2,
    terminal_ids: Tensor | None = None,
    k_max: int = 32,
    hidden: Tensor | None = None,
    lm_head: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    order: str = "top_k_first",
    need_lse: bool = False,
    need_entropy: bool = False,
    out: SoftToken | None = None,
    backend: str = "auto",
) -> SoftToken:
    """Samples one position per row: candidates, Gumbel noise, mixture weights, mixed embedding.

    Soft rows (SofT-GRPO, arXiv 2511.06411): a = z/T; the first top_k
    by (logit descending, id ascending); of them those with less than top_p before them and at least
    min_p times the largest p; p renormalised over what is left; g' = log p + noise_scale * noise;
    weights = softmax(g'/tau); token = argmax g'. A token at -inf is never a candidate.

    Discrete rows draw the token by Gumbel-max from the same set, and from the whole vocabulary (or
    its nucleus) where top_k <= 0 or top_k > k_max: then slot 0 alone is recorded.

    Every scalar argument is a number or a tensor [B]. A row's result depends on that row alone.

    A number out of its range is a ValueError on every device, and so is a tensor on the CPU. A
    tensor on another device is not looked at, which would wait for it: a row with a value out of
    its range comes back with valid False and token -1, as one whose logits are NaN.

    Args:
        logits: [B, V] float32, bfloat16 or float16; any row stride. float64: reference only, and
            float64 results. None: from hidden and lm_head, as in `soft_token_from_hidden`.
        embed: [V, H] input embeddings, or None: no mixture is made.
        temperature: T > 0, not denormal, in sampled rows.
        top_k: 1 .. k_max in soft rows, which must give it. Discrete rows: any, <= 0 is the whole
            vocabulary.
        top_p: >= 0, >= 1 keeps everything. min_p: relative to the most probable candidate.
        gumbel_tau: tau > 0, not denormal, of the mixture weights.
        noise: of soft rows; a name or a tensor of their indices in `NOISES`:
            "gumbel": as above;
            "none": g' = log p (Soft Thinking, 2505.15778);
            "dirichlet": g' = log x, x ~ Dirichlet(noise_scale p) (2508.03440);
            "gaussian": g' = log max(p + noise_scale N(0, 1), 1e-6);
            "multiplex": g' = log(count / noise_scale) of noise_scale independent draws from p; the
            slots are the tokens drawn (2601.08808). The last three go with gumbel_tau 1.
        noise_scale: >= 0, see noise; soft rows only. noise_clamp: None or bounds (low, high) or
            [B, 2] of the Gumbel noise before the factor, soft rows only.
        eps: soft rows only. > 0 keeps all top_k candidates, with log(p + eps) for log p, p = 0 for
            those that top-p or min-p cut (the released code of the paper uses 1e-6).
        seed: int64 key of the noise. position, uid, stream: its counter, 0 .. 2^32 - 1 each.
        mode: 0 greedy, 1 discrete, 2 soft, 3 skip.
        terminal_ids: int [B, E], -1 pads: a soft row whose token is among them becomes discrete
            (kind 0, one-hot weights) and keeps its candidates.
        k_max: slots per row, at most 64.
        hidden, lm_head: [B, H'], [V, H'] in one dtype. Given, the logits only select the top_k; the
            candidates' logits are then computed again as fp32 dot products.
        bias, softcap, logit_scale: of that head, bias [V] or None:
            z = softcap tanh(logit_scale (W x + bias) / softcap).
        order: "top_k_first": top_p is a share of the top_k's mass. "joint": of the vocabulary's.
        need_lse, need_entropy: also return those of the whole vocabulary.
        out: room for the result, contiguous; it is returned. None: it is allocated.
        backend: "auto" (CPU tensors: C++ where it is built; CUDA: Triton), "reference", "cpu" or
            "triton".

    Raises:
        ValueError: shapes, dtypes or parameters that do not fit. Bad logits, and bad parameters in
            tensors on a device, raise nothing: see `SoftToken.valid`.
    """
    source, _ = _check_source(logits, hidden, lm_head)
    rows = RowParameters.pack(
        source.shape[0],
        source.device,
        k_max,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        gumbel_tau=gumbel_tau,
        noise_scale=noise_scale,
        noise_clamp=noise_clamp,
        eps=eps,
        seed=seed,
        position=position,
        uid=uid,
        stream=stream,
        mode=mode,
        noise=noise,
    )
    return soft_token_of_rows(
        logits,
        rows,
        embed,
        terminal_ids=terminal_ids,
        hidden=hidden,
        lm_head=lm_head,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        order=order,
        need_lse=need_lse,
        need_entropy=need_entropy,
        out=out,
        backend=backend,
    )


@torch.no_grad()
def soft_token_of_rows(
    logits: Tensor | None,
    rows: RowParameters,
    embed: Tensor | None = None,
    *,
    terminal_ids: Tensor | None = None,
    hidden: Tensor | None = None,
    lm_head: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    order: str = "top_k_first",
    need_lse: bool = False,
    need_entropy: bool = False,
    out: SoftToken | None = None,
    backend: str = "auto",
) -> SoftToken:
    """`soft_token` with the parameters of its rows already in two tables, as an engine keeps them.

    Args:
        rows: on the device of the logits, [8, B] and [7, B]; see `RowParameters`.
        The others are those of `soft_token`.

    Raises:
        ValueError: see `soft_token`.
    """
    source, vocabulary = _check_source(logits, hidden, lm_head)
    if vocabulary > MAX_VOCABULARY:
        raise ValueError(f"at most {MAX_VOCABULARY} tokens, not {vocabulary}")
    _check_tables(source, vocabulary, embed, terminal_ids)
    _check_head(source, vocabulary, hidden, lm_head, bias, softcap, logit_scale, order)
    rows.check_shape(source.shape[0], source.device)
    k_max = rows.k_max
    layout = SoftToken.layout(source, k_max, embed, need_lse, need_entropy)
    if out is None:
        out = SoftToken(**{name: _new(spec, source.device) for name, spec in layout.items()})  # type: ignore[arg-type]
    else:
        out.check_room(layout, source.device)
    run: Callable[..., None] = torch.ops.softgrpo_kernels.soft_token
    if backend != "auto":
        run = partial(ops.soft_token, backend=backend)
    outputs = (getattr(out, name) for name in OUTPUTS)
    joint = order == "joint"
    run(
        logits, embed, rows.floats, rows.ints, terminal_ids, hidden, lm_head, bias, softcap,
        logit_scale, joint, *outputs,
    )  # fmt: skip
    return out


def _new(spec: tuple[torch.dtype, tuple[int, ...]] | None, device: torch.device) -> Tensor | None:
    return None if spec is None else torch.empty(spec[1], dtype=spec[0], device=device)


def soft_token_from_hidden(
    hidden: Tensor,
    lm_head: Tensor,
    embed: Tensor | None = None,
    **options: Any,
) -> SoftToken:
    """`soft_token` from the last hidden states: the LM head and the sampling in one call.

    The logits are rounded to hidden's dtype; they select the candidates, whose logits are then
    computed again as fp32 dot products. On CUDA and for at most 128 rows one kernel reads the
    weight and leaves the logits with their statistics, so that they are never read back whole.

    Args:
        hidden: [B, H]; lm_head: [V, H] in the same dtype.
        options: the other arguments of `soft_token`; bias, softcap and logit_scale among them.

    Raises:
        ValueError: see `soft_token`.
    """
    return soft_token(None, embed, hidden=hidden, lm_head=lm_head, **options)


def gumbel_noise(
    ids: Tensor,
    seed: int | Tensor,
    position: int | Tensor,
    uid: int | Tensor,
    stream: int | Tensor = 0,
) -> Tensor:
    """The Gumbel noise that `soft_token` adds to these tokens, to the bit.

    Args:
        ids: int [..., K], token ids; slots < 0 get 0.
        seed, position, uid, stream: numbers or int64 tensors that broadcast against ids[..., 0].

    Returns:
        float32 [..., K]. On a device, NaN where a tensor there holds a bad position, uid or stream.

    Raises:
        ValueError: position, uid or stream outside 0 .. 2^32 - 1; a shape that does not fit.
    """
    check_integers("ids", ids)
    keys = {"seed": seed, "position": position, "uid": uid, "stream": stream}
    tensors = [_noise_key(name, key, ids) for name, key in keys.items()]
    return torch.ops.softgrpo_kernels.gumbel_noise(ids, *tensors)


def _noise_key(name: str, key: int | Tensor, ids: Tensor) -> Tensor:
    if not isinstance(key, Tensor):
        check_word(name, key)
        if name != "seed" and not 0 <= key <= LAST_WORD:
            raise ValueError(f"{name} must be in 0 .. 2^32 - 1 (take it modulo 2^32), not {key}")
        # Not a copy of a number from the host: a device would be waited for.
        return torch.full((), key, dtype=torch.int64, device=ids.device)
    check_integers(name, key)
    rows = ids.shape[:-1]
    fits = key.dim() <= len(rows) and all(
        have in (1, want) for have, want in zip(key.shape[::-1], rows[::-1], strict=False)
    )
    if not fits:
        raise ValueError(f"{name} must broadcast to {list(rows)}, not {list(key.shape)}")
    return key.to(device=ids.device, dtype=torch.int64)


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


def _check_source(
    logits: Tensor | None, hidden: Tensor | None, lm_head: Tensor | None
) -> tuple[Tensor, int]:
    """The tensor whose rows are sampled, [B, V] or [B, H], and V."""
    if logits is not None:
        if logits.dim() != 2 or not logits.is_floating_point() or logits.shape[1] == 0:
            raise ValueError(
                f"logits must be floating [B, V], not {logits.dtype} {list(logits.shape)}"
            )
        return logits, logits.shape[1]
    if hidden is None or lm_head is None:
        raise ValueError("give logits, or hidden and lm_head to compute them from")
    if hidden.dim() != 2 or lm_head.dim() != 2 or hidden.shape[1] != lm_head.shape[1]:
        raise ValueError(
            f"need hidden [B, H] and lm_head [V, H], got {list(hidden.shape)} and "
            f"{list(lm_head.shape)}"
        )
    return hidden, lm_head.shape[0]


def _check_tables(
    source: Tensor, vocabulary: int, embed: Tensor | None, terminal_ids: Tensor | None
) -> None:
    if embed is not None:
        if embed.dim() != 2 or embed.shape[0] < vocabulary or not embed.is_floating_point():
            raise ValueError(
                f"embed must be floating [V = {vocabulary}, H], not {embed.dtype} "
                f"{list(embed.shape)}"
            )
        check_device("embed", embed, source.device)
    if terminal_ids is not None:
        if terminal_ids.dim() != 2 or terminal_ids.shape[0] != source.shape[0]:
            raise ValueError(
                f"terminal_ids must be [{source.shape[0]}, E], not {list(terminal_ids.shape)}"
            )
        check_integers("terminal_ids", terminal_ids)
        check_device("terminal_ids", terminal_ids, source.device)


def _check_head(
    source: Tensor,
    vocabulary: int,
    hidden: Tensor | None,
    lm_head: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    order: str,
) -> None:
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, not {order!r}")
    if (hidden is None) != (lm_head is None):
        raise ValueError("hidden and lm_head go together: give both or neither")
    if hidden is None or lm_head is None:
        return
    check_head_map(softcap, logit_scale)
    rows = source.shape[0]
    if order == "joint":
        raise ValueError("order 'joint' takes the logits as they are: leave out hidden and lm_head")
    if hidden.dtype != lm_head.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, lm_head {lm_head.dtype}: cast one of them")
    if hidden.shape != (rows, lm_head.shape[1]) or lm_head.shape[0] < vocabulary:
        raise ValueError(
            f"need hidden [{rows}, H] and lm_head [{vocabulary}, H], got {list(hidden.shape)} and "
            f"{list(lm_head.shape)}"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] < vocabulary):
        raise ValueError(f"bias must be [V = {vocabulary}], not {list(bias.shape)}")
    for name, tensor in (("hidden", hidden), ("lm_head", lm_head), ("bias", bias)):
        if tensor is not None:
            check_device(name, tensor, source.device)
