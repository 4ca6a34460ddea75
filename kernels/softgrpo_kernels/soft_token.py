"""The soft step of a decode: logits in, soft token and its embedding out.

The op `torch.ops.softgrpo_kernels.soft_token` writes into the tensors it is given, so that the same
op serves `out=`, CUDA graphs and `torch.compile`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softgrpo_kernels.backends import LIBRARY, backend_of
from softgrpo_kernels.cpu import soft_token as cpu
from softgrpo_kernels.limits import MAX_CANDIDATES
from softgrpo_kernels.lm_head import LMHead
from softgrpo_kernels.reference import soft_token as reference
from softgrpo_kernels.row_parameters import Clamp, Number, RowParameters
from softgrpo_kernels.soft_token_tensors import OUTPUTS, SoftToken, SoftTokenInputs


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
    weight_floor: Number = 0.0,
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
    k_max: int | None = None,
    hidden: Tensor | None = None,
    lm_head: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    order: str = "top_k_first",
    need_lse: bool = False,
    need_entropy: bool = False,
    need_kept_mass: bool = False,
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
            float64 results. None: those of hidden and lm_head, rounded to their dtype; on CUDA and
            for at most 128 rows one kernel reads the weight and leaves the logits with their
            statistics, so that they are never read back whole.
        embed: [V, H] input embeddings, or None: no mixture is made.
        temperature: T > 0, not denormal, in sampled rows.
        top_k: 1 .. k_max in soft rows, which must give it. Discrete rows: any, <= 0 is the whole
            vocabulary.
        top_p: >= 0, >= 1 keeps everything. min_p: relative to the most probable candidate.
        gumbel_tau: tau > 0, not denormal, of the mixture weights. weight_floor: 0 .. 1; a weight
            below so much of the largest is 0, and the others add up to 1. Soft rows only.
        noise: of soft rows; a name or a tensor of their indices in `NOISES`:
            "gumbel": as above;
            "none": g' = log p (Soft Thinking, 2505.15778; Soft Tokens, 2509.19170, whose noise
            goes on the mixture: `embedding_noise`);
            "dirichlet": g' = log x, x ~ Dirichlet(noise_scale p) (2508.03440);
            "gaussian": g' = log max(p + noise_scale N(0, 1), 1e-6);
            "multiplex": g' = log(count / noise_scale) of noise_scale independent draws from p, the
            token the first of them (2601.08808, 2505.23648);
            "multiplex_weighted": g' = log(count p), see `methods.multiplex_weighted`;
            "mixture_of_inputs": of a drawn token and p, noise_scale beta (2505.14827);
            "mean": g' = log p, beside a drawn token.
            The last four draw the token from p: it stands in slot 0 before all others, whatever its
            g', candidates with g' = -inf keep their slots, and there is no weight_floor. All but
            gumbel, none and mean go with gumbel_tau 1.
        noise_scale: >= 0, see noise; soft rows only. noise_clamp: None or bounds (low, high) or
            [B, 2] of the Gumbel noise before the factor, soft rows only.
        eps: soft rows only. > 0 keeps all top_k candidates, with log(p + eps) for log p, p = 0 for
            those that top-p or min-p cut (the released code of the paper uses 1e-6).
        seed: int64 key of the noise. position, uid, stream: its counter, 0 .. 2^32 - 1 each.
        mode: 0 greedy, 1 discrete, 2 soft, 3 skip.
        terminal_ids: int [B, E], -1 pads: a soft row whose token is among them becomes discrete
            (kind 0, one-hot weights) and keeps its candidates.
        k_max: slots per row, at most 64; sorting for more of them costs more. None: top_k where it
            is a number from 1 to 64, else 32.
        hidden, lm_head: [B, H'], [V, H'] in one dtype. Given, the logits only select the top_k; the
            candidates' logits are then computed again as fp32 dot products.
        bias, softcap, logit_scale: of that head, bias [V] or None:
            z = softcap tanh(logit_scale (W x + bias) / softcap).
        order: "top_k_first": top_p is a share of the top_k's mass. "joint": of the vocabulary's.
        need_lse, need_entropy: also return those of the whole vocabulary.
        need_kept_mass: also return the probability of the set that a discrete token was drawn from.
        out: room for the result, contiguous; it is returned. None: it is allocated.
        backend: "auto" (CPU tensors: C++ where it is built; CUDA: Triton), "reference", "cpu" or
            "triton".

    Raises:
        ValueError: shapes, dtypes or parameters that do not fit. Bad logits, and bad parameters in
            tensors on a device, raise nothing: see `SoftToken.valid`.
    """
    inputs = SoftTokenInputs.checked(
        logits, embed, terminal_ids, hidden, lm_head, bias, softcap, logit_scale, order
    )
    rows = RowParameters.pack(
        inputs.source.shape[0],
        inputs.source.device,
        _slots(k_max, top_k),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        gumbel_tau=gumbel_tau,
        weight_floor=weight_floor,
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
    return _sample(inputs, rows, (need_lse, need_entropy, need_kept_mass), out, backend)


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
    need_kept_mass: bool = False,
    out: SoftToken | None = None,
    backend: str = "auto",
) -> SoftToken:
    """`soft_token` with the parameters of its rows already in two tables, as an engine keeps them.

    Args:
        rows: on the device of the logits, [9, B] and [7, B]; see `RowParameters`.
        The others are those of `soft_token`.

    Raises:
        ValueError: see `soft_token`.
    """
    inputs = SoftTokenInputs.checked(
        logits, embed, terminal_ids, hidden, lm_head, bias, softcap, logit_scale, order
    )
    rows.check_shape(inputs.source.shape[0], inputs.source.device)
    return _sample(inputs, rows, (need_lse, need_entropy, need_kept_mass), out, backend)


def _sample(
    inputs: SoftTokenInputs,
    rows: RowParameters,
    needed: tuple[bool, bool, bool],
    out: SoftToken | None,
    backend: str,
) -> SoftToken:
    """The op on checked arguments."""
    source = inputs.source
    device = source.device
    layout = SoftToken.layout(source, rows.k_max, inputs.embed, *needed)
    if out is None:
        out = SoftToken(**{name: _room(spec, device) for name, spec in layout.items()})  # type: ignore[arg-type]
    else:
        out.check_room(layout, device)
    arguments = (
        inputs.logits, inputs.embed, rows.floats, rows.ints, rows.may_be_unlisted,
        inputs.terminal_ids, *(inputs.head or _NO_HEAD), inputs.joint,
        *(getattr(out, name) for name in OUTPUTS),
    )  # fmt: skip
    if backend == "auto":
        torch.ops.softgrpo_kernels.soft_token(*arguments)
    else:
        _op(*arguments, backend=backend)
    return out


def _slots(k_max: int | None, top_k: int | Tensor) -> int:
    if k_max is not None:
        return k_max
    return top_k if isinstance(top_k, int) and 1 <= top_k <= MAX_CANDIDATES else 32


_NO_HEAD = (None, None, None, None, 1.0)


def _room(spec: tuple[torch.dtype, tuple[int, ...]] | None, device: torch.device) -> Tensor | None:
    return None if spec is None else torch.empty(spec[1], dtype=spec[0], device=device)


def _op(
    logits: Tensor | None,
    embed: Tensor | None,
    floats: Tensor,
    ints: Tensor,
    may_be_unlisted: bool,
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
    out = SoftToken(*outputs)
    rows = RowParameters(floats, ints, out.ids.shape[1], may_be_unlisted)
    if floats.is_cpu:
        rows.check()  # elsewhere the kernels mark rows as not valid
    head = None
    if hidden is not None and lm_head is not None:
        head = LMHead(hidden, lm_head, bias, softcap, logit_scale)
    tables = (x.dtype for x in (logits, embed, lm_head) if x is not None)
    backend = backend_of(backend, floats.device, *tables)
    if logits is None and head is not None and backend != "triton":  # which does both at once
        logits = head.logits()
    inputs = SoftTokenInputs(logits, embed, terminal_ids, head, joint)
    if backend == "cpu":
        return cpu.soft_token(inputs, rows, out)
    if backend == "triton":
        from softgrpo_kernels.gpu import soft_token as gpu

        return gpu.soft_token(inputs, rows, out)
    return reference.soft_token(inputs, rows, out)


LIBRARY.define(
    "soft_token(Tensor? logits, Tensor? embed, Tensor floats, Tensor ints, "
    "bool may_be_unlisted, Tensor? terminal_ids, Tensor? hidden, Tensor? lm_head, Tensor? bias, "
    "float? softcap, float logit_scale, bool joint, "
    "Tensor(a!) ids, Tensor(b!) gprime, Tensor(c!) weights, Tensor(d!) logp, Tensor(e!) n, "
    "Tensor(f!) token, Tensor(g!) token_logp, Tensor(h!) kind, Tensor(i!)? embedded, "
    "Tensor(j!)? lse, Tensor(k!)? entropy, Tensor(l!)? kept_mass, Tensor(m!) valid) -> ()"
)
LIBRARY.impl("soft_token", _op, "CompositeExplicitAutograd")
torch.library.register_fake("softgrpo_kernels::soft_token", lambda *arguments: None)
