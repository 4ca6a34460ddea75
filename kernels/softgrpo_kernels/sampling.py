"""The soft step of a decode: logits in, soft token and its embedding out."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from softgrpo_kernels import reference
from softgrpo_kernels.extension import cpu_extension
from softgrpo_kernels.rows import Clamp, Number, RowParameters, SoftToken, check_counter_words

# Numbers of the dtypes in C++.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@torch.no_grad()
def soft_token(
    logits: Tensor,
    embed: Tensor | None = None,
    *,
    temperature: Number = 1.0,
    top_k: int | Tensor = -1,
    top_p: Number = 1.0,
    min_p: Number = 0.0,
    gumbel_tau: Number = 0.1,
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
    need_lse: bool = False,
    need_entropy: bool = False,
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

    Args:
        logits: [B, V] float32, bfloat16 or float16; any row stride. float64: reference only, and
            float64 results.
        embed: [V, H] input embeddings, or None: no mixture is made.
        temperature: T > 0 in sampled rows.
        top_k: 1 .. k_max in soft rows. Discrete rows: any, <= 0 is the whole vocabulary.
        top_p: >= 1 keeps everything. min_p: relative to the most probable candidate.
        gumbel_tau: tau > 0 of the mixture weights.
        noise_scale: factor on the noise, soft rows only. noise_clamp: None or bounds (low, high) or
            [B, 2] of the noise before the factor, soft rows only.
        eps: soft rows only. > 0 keeps all top_k candidates, with log(p + eps) for log p, p = 0 for
            those that top-p or min-p cut (the released code of the paper uses 1e-6).
        seed: int64 key of the noise. position, uid, stream: its counter, 0 .. 2^32 - 1 each.
        mode: 0 greedy, 1 discrete, 2 soft, 3 skip.
        terminal_ids: int [B, E], -1 pads: a soft row whose token is among them becomes discrete
            (kind 0, one-hot weights) and keeps its candidates.
        k_max: slots per row, at most 64.
        hidden, lm_head: [B, H'], [V, H'] in one dtype. Given, the logits only select the top_k; the
            candidates' logits are then computed again as fp32 dot products.
        need_lse, need_entropy: also return those of the whole vocabulary.
        backend: "auto" (C++ for CPU tensors where it is built), "reference" or "cpu".

    Raises:
        ValueError: shapes, dtypes or parameters that do not fit. Bad logits raise nothing: see
            `SoftToken.valid`.
    """
    _check_tables(logits, embed, hidden, lm_head, terminal_ids)
    rows = RowParameters.pack(
        logits.shape[0],
        logits.device,
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
    )
    tables = [x for x in (logits, embed, hidden, lm_head) if x is not None]
    kernels = _kernels(backend, tables)
    step = reference.soft_token if kernels is None else partial(_soft_token_cpu, kernels)
    return step(
        logits,
        embed,
        rows,
        terminal_ids=terminal_ids,
        hidden=hidden,
        lm_head=lm_head,
        need_lse=need_lse,
        need_entropy=need_entropy,
    )


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
        float32 [..., K].

    Raises:
        ValueError: position, uid or stream outside 0 .. 2^32 - 1.
    """
    keys = [
        torch.as_tensor(key, dtype=torch.int64, device=ids.device)
        for key in (seed, position, uid, stream)
    ]
    if ids.is_cpu:
        check_counter_words(*keys[1:])
    kernels = cpu_extension() if ids.is_cpu else None
    if kernels is None or ids.dim() == 0:
        return reference.gumbel_noise(ids, *keys)
    ids = ids.to(torch.int32).contiguous()
    keys = [key.expand(ids.shape[:-1]).contiguous() for key in keys]
    out = torch.empty(ids.shape, dtype=torch.float32)
    kernels.gumbel_noise(
        out.data_ptr(),
        ids.data_ptr(),
        *(key.data_ptr() for key in keys),
        keys[0].numel(),
        ids.shape[-1],
    )
    return out


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
    if ids.shape != weights.shape or embed.dim() != 2:
        raise ValueError(
            f"need ids and weights of one shape [..., K] and embed [V, H], got {list(ids.shape)}, "
            f"{list(weights.shape)}, {list(embed.shape)}"
        )
    if ids.is_cpu and ids.numel() and ids.max() >= embed.shape[0]:
        raise ValueError(f"id {int(ids.max())}: embed has {embed.shape[0]} rows")
    return _SoftEmbedding.apply(ids, weights, embed)


class _SoftEmbedding(torch.autograd.Function):
    """dw_j = <d, E[id_j]>; dE[id_j] += w_j d."""

    @staticmethod
    def forward(ctx: FunctionCtx, ids: Tensor, weights: Tensor, embed: Tensor) -> Tensor:
        ctx.save_for_backward(ids, weights, embed)
        kernels = _kernels("auto", [embed])
        if kernels is None:
            return reference.soft_embedding(ids, weights, embed)
        table = _unit_stride(embed)
        ids, weights = ids.to(torch.int32).contiguous(), weights.float().contiguous()
        out = embed.new_empty((*ids.shape[:-1], embed.shape[1]))
        kernels.soft_embedding(
            out.data_ptr(),
            ids.data_ptr(),
            weights.data_ptr(),
            ids.numel() // max(1, ids.shape[-1]),
            ids.shape[-1],
            table.data_ptr(),
            table.stride(0),
            table.shape[1],
            _DTYPES[table.dtype],
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, weights, embed = ctx.saved_tensors  # type: ignore[attr-defined]
        wide = torch.float64 if embed.dtype == torch.float64 else torch.float32
        live, tokens, grad = ids >= 0, ids.long().clamp(min=0), grad.to(wide)
        d_weights = d_embed = None
        if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            products = (embed[tokens].to(wide) * grad.unsqueeze(-2)).sum(-1)
            d_weights = torch.where(live, products, 0.0).to(weights.dtype)
        if ctx.needs_input_grad[2]:  # type: ignore[attr-defined]
            terms = weights.to(wide).unsqueeze(-1) * grad.unsqueeze(-2)
            d_embed = torch.zeros_like(embed, dtype=wide)
            d_embed.index_put_((tokens[live],), terms[live], accumulate=True)
            d_embed = d_embed.to(embed.dtype)
        return None, d_weights, d_embed


def _kernels(backend: str, tables: list[Tensor]) -> ModuleType | None:
    """The C++ kernels where they are to be used; None: the reference."""
    if backend not in ("auto", "reference", "cpu"):
        raise ValueError(f"backend must be auto, reference or cpu, not {backend!r}")
    if backend == "reference":
        return None
    able = all(x.is_cpu and x.dtype in _DTYPES for x in tables)
    kernels = cpu_extension() if able else None
    if backend == "cpu" and kernels is None:
        raise ValueError(
            "backend 'cpu' needs the compiled extension and CPU tensors of float32, bfloat16 or "
            "float16"
        )
    return kernels


def _soft_token_cpu(
    kernels: ModuleType,
    logits: Tensor,
    embed: Tensor | None,
    rows: RowParameters,
    *,
    terminal_ids: Tensor | None,
    hidden: Tensor | None,
    lm_head: Tensor | None,
    need_lse: bool,
    need_entropy: bool,
) -> SoftToken:
    """Fills the outputs through pointers; what they point into lives until the return."""
    batch, k_max = logits.shape[0], rows.k_max
    logits = _unit_stride(logits)
    embed, hidden, lm_head = (
        None if x is None else _unit_stride(x) for x in (embed, hidden, lm_head)
    )
    if terminal_ids is not None:
        terminal_ids = terminal_ids.to(torch.int32).contiguous()

    def new(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty((batch, *shape), dtype=dtype)

    out = SoftToken(
        ids=new(torch.int32, k_max),
        gprime=new(torch.float32, k_max),
        weights=new(torch.float32, k_max),
        logp=new(torch.float32, k_max),
        n=new(torch.int32),
        token=new(torch.int32),
        token_logp=new(torch.float32),
        kind=new(torch.uint8),
        embed=None if embed is None else new(embed.dtype, embed.shape[1]),
        lse=new(torch.float32) if need_lse else None,
        entropy=new(torch.float32) if need_entropy else None,
        valid=new(torch.bool),
    )
    kernels.soft_token(
        rows=batch,
        vocabulary=logits.shape[1],
        k_max=k_max,
        floats=rows.floats.data_ptr(),
        ints=rows.ints.data_ptr(),
        logits=logits.data_ptr(),
        logits_dtype=_DTYPES[logits.dtype],
        logits_stride=logits.stride(0),
        terminal_ids=_address(terminal_ids),
        terminal_width=0 if terminal_ids is None else terminal_ids.shape[1],
        hidden=_address(hidden),
        hidden_stride=0 if hidden is None else hidden.stride(0),
        **_table("lm_head", lm_head),
        **_table("embed", embed),
        **{f"out_{field.name}": _address(getattr(out, field.name)) for field in fields(out)},
    )
    return out


def _table(name: str, table: Tensor | None) -> dict[str, int]:
    address, stride, width, dtype = (0, 0, 0, 0)
    if table is not None:
        address, stride, width = table.data_ptr(), table.stride(0), table.shape[1]
        dtype = _DTYPES[table.dtype]
    values = {"": address, "_stride": stride, "_width": width, "_dtype": dtype}
    return {name + suffix: value for suffix, value in values.items()}


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _unit_stride(x: Tensor) -> Tensor:
    """x itself when its last axis is contiguous (rows may lie apart), else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _check_tables(
    logits: Tensor,
    embed: Tensor | None,
    hidden: Tensor | None,
    lm_head: Tensor | None,
    terminal_ids: Tensor | None,
) -> None:
    if logits.dim() != 2 or not logits.is_floating_point() or logits.shape[1] == 0:
        raise ValueError(f"logits must be floating [B, V], not {logits.dtype} {list(logits.shape)}")
    rows, vocabulary = logits.shape
    if embed is not None and (embed.dim() != 2 or embed.shape[0] < vocabulary):
        raise ValueError(f"embed must be [V = {vocabulary}, H], not {list(embed.shape)}")
    if terminal_ids is not None and (terminal_ids.dim() != 2 or terminal_ids.shape[0] != rows):
        raise ValueError(f"terminal_ids must be [{rows}, E], not {list(terminal_ids.shape)}")
    if (hidden is None) != (lm_head is None):
        raise ValueError("hidden and lm_head go together: give both or neither")
    if hidden is None or lm_head is None:
        return
    if hidden.dtype != lm_head.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, lm_head {lm_head.dtype}: cast one of them")
    if hidden.shape != (rows, lm_head.shape[1]) or lm_head.shape[0] < vocabulary:
        raise ValueError(
            f"need hidden [{rows}, H] and lm_head [{vocabulary}, H], got {list(hidden.shape)} and "
            f"{list(lm_head.shape)}"
        )
